# SPDX-License-Identifier: Apache-2.0
"""Kernels on rows give what the models' own functions give in float64, but for rounding.

In float32 a norm is off by what a sum over its row may be, `gamma(width)`; what has no sum by a few roundings: `FEW`.
Rounded once more, to bfloat16 or FP8, a number is off by at most half a step of its format besides.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_serve.kernels.norm_silu import norm_silu
from longlive_serve.kernels.norms import residual_norm, rms_norm
from longlive_serve.kernels.quantize import QuantizedRows, gelu, quantize_rows
from longlive_serve.kernels.rotary import norm_rotate_write, rotate_keys
from longlive_serve.models.dit.causal_dit import RMSNorm, gated, modulate
from longlive_serve.models.dit.rope import rotate
from longlive_serve.models.vae import decoder
from tests.fakes.triton_on_cpu import DEVICE, error, random
from tests.support.tolerance import Float64, gamma

pytestmark = pytest.mark.numeric
EPS = 1e-6
FEW = gamma(16)
SHAPES = [(37, 1536), (5, 192), (130, 48)]


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def bfloat16_error(got: Tensor, wanted: Tensor) -> float:
    """In halves of the largest step of bfloat16 around a number: at most 1 after one rounding."""
    assert got.dtype == torch.bfloat16
    wanted = wanted.detach()
    before = wanted.abs().max() * gamma(wanted.shape[1])
    return float(((got.double() - wanted).abs() / (wanted.abs() * 2**-8 + before)).max())


def fp8_error(got: Tensor | QuantizedRows, wanted: Tensor) -> float:
    """In halves of the largest step of E4M3 around a number: at most 1 after one rounding. Scales are checked."""
    assert isinstance(got, QuantizedRows)
    assert got.values.dtype == torch.float8_e4m3fn
    scales, before = wanted.abs().amax(1, keepdim=True) / 448, gamma(wanted.shape[1])
    assert error(got.scales, scales) < before
    expected = (wanted / scales).to(torch.float8_e4m3fn)
    # A number may have been on the other side of the middle of two: steps are 2^-4 of it or wider, but near zero.
    assert (got.values.float() != expected.float()).float().mean() < 100 * before
    half_step = (wanted.abs() * 2**-4).clamp_min(scales * 2**-10) + wanted.abs().max() * before
    return float(((got.values.double() * got.scales - wanted).abs() / half_step).max())


def normed(x: Tensor, scale: Tensor, shift: Tensor, one_plus: bool) -> Tensor:
    """In float64."""
    x, scale, shift = wide(x, scale, shift)
    y = F.layer_norm(x, x.shape[1:], eps=EPS)[None]
    return modulate(y, shift[None, None], scale[None, None] - (0 if one_plus else 1))[0]


class TestResidualNorm:
    @pytest.mark.parametrize(("length", "width"), SHAPES)
    @pytest.mark.parametrize("one_plus", [True, False])
    def test_it_adds_a_gated_update_and_norms_the_sum(self, length: int, width: int, one_plus: bool) -> None:
        x, update = random(length, width), random(length, width, seed=1)
        gate, scale, shift = random(3, width, seed=2)
        total = x.double() + gated(update.double()[None], gate.double()[None, None])[0]
        got = residual_norm(x, update, gate, scale, shift, eps=EPS, one_plus=one_plus)
        assert isinstance(got, Tensor)
        assert error(x, total) < FEW
        assert error(got, normed(total, scale, shift, one_plus)) < gamma(width)

    def test_without_a_gate_the_update_is_added_whole(self) -> None:
        x, update = random(9, 192), random(9, 192, seed=1)
        scale, shift = random(2, 192, seed=2)
        total = x + update
        got = residual_norm(x, update, None, scale, shift, eps=EPS, one_plus=False)
        assert isinstance(got, Tensor)
        assert error(x, total) == 0
        assert error(got, normed(total, scale, shift, False)) < gamma(192)

    def test_without_an_update_x_stays_as_it_is(self) -> None:
        x = random(9, 192)
        before, (scale, shift) = x.clone(), random(2, 192, seed=2)
        got = residual_norm(x, None, None, scale, shift, eps=EPS, one_plus=True)
        assert isinstance(got, Tensor)
        assert x.equal(before)
        assert error(got, normed(x, scale, shift, True)) < gamma(192)

    def test_the_norm_is_that_of_x_as_stored(self) -> None:
        x, update = (random(33, 1536, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        gate, scale, shift = random(3, 1536, dtype=torch.bfloat16, seed=2)
        total = x.double() + gate.double() * update.double()
        got = residual_norm(x, update, gate, scale, shift, eps=EPS, one_plus=True)
        assert isinstance(got, Tensor)
        assert bfloat16_error(x, total) <= 1
        assert bfloat16_error(got, normed(x, scale, shift, True)) <= 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_its_result_can_be_fp8(self, dtype: torch.dtype) -> None:
        x, update = (random(33, 1536, dtype=dtype, seed=seed) for seed in (0, 1))
        gate, scale, shift = random(3, 1536, dtype=dtype, seed=2)
        got = residual_norm(x, update, gate, scale, shift, eps=EPS, one_plus=True, fp8=True)
        assert fp8_error(got, normed(x, scale, shift, True)) <= 1


class TestRMSNorm:
    @pytest.mark.parametrize(("length", "width"), SHAPES)
    def test_it_norms_columns_of_a_wider_matrix(self, length: int, width: int) -> None:
        x = random(length, 3 * width)[:, width : 2 * width]
        norm = RMSNorm(width, EPS).to(DEVICE)
        norm.weight.data = random(width, seed=1)
        got = rms_norm(x, norm.weight, eps=EPS)
        assert got.is_contiguous()
        with Float64():
            wanted = norm(x)
        assert error(got, wanted) < gamma(width)

    def test_rows_of_zeros_stay_zeros(self) -> None:
        assert not rms_norm(torch.zeros(3, 192, device=DEVICE), random(192), eps=EPS).any()

    def test_bfloat16_is_rounded_once(self) -> None:
        x, weight = random(33, 1536, dtype=torch.bfloat16), random(1536, dtype=torch.bfloat16, seed=1)
        norm = RMSNorm(1536, EPS).to(DEVICE)
        norm.weight.data = weight.float()
        with Float64():
            wanted = norm(x.float())
        assert bfloat16_error(rms_norm(x, weight, eps=EPS), wanted) <= 1


class TestQuantization:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("length", "width"), SHAPES)
    def test_rows_are_scaled_to_the_range_of_fp8(self, length: int, width: int, dtype: torch.dtype) -> None:
        x = random(length, 2 * width, dtype=dtype)[:, width:]
        assert fp8_error(quantize_rows(x), x.double()) <= 1

    def test_rows_of_zeros_and_of_huge_numbers_stay_what_they_are(self) -> None:
        x = random(4, 192)
        x[0], x[1, 7], x[2] = 0, 1e30, x[2] * 1e-20
        got = quantize_rows(x)
        back = got.values.float() * got.scales
        assert back.isfinite().all()
        assert not back[0].any()
        assert back[1].count_nonzero() == 1
        assert back[1, 7] == pytest.approx(1e30)
        assert back[2].abs().max() <= 1e-12  # beneath the smallest scale

    @pytest.mark.parametrize(("length", "width"), [*SHAPES, (7, 8960), (3, 64)])
    def test_gelu(self, length: int, width: int) -> None:
        x = 3 * random(length, width)
        wanted = F.gelu(x.double(), approximate="tanh")
        got = gelu(x)
        assert isinstance(got, Tensor)
        assert error(got, wanted) < FEW
        assert fp8_error(gelu(x, fp8=True), wanted) <= 1

    def test_gelu_in_bfloat16_is_rounded_once(self) -> None:
        x = 3 * random(7, 8960, dtype=torch.bfloat16)
        got = gelu(x)
        assert isinstance(got, Tensor)
        assert bfloat16_error(got, F.gelu(x.double(), approximate="tanh")) <= 1

    def test_gelu_of_huge_numbers_is_the_number_or_zero(self) -> None:
        x = torch.tensor([[1e30, -1e30, 0, 0], [0, 0, 0, 0]], device=DEVICE)
        got = gelu(x)
        assert isinstance(got, Tensor)
        assert got.tolist() == [[pytest.approx(1e30), 0, 0, 0], [0, 0, 0, 0]]
        assert gelu(x, fp8=True)[0].float().tolist() == [[448, 0, 0, 0], [0, 0, 0, 0]]


class TestRotary:
    """Heads of queries, keys and values from their joint projection."""

    @staticmethod
    def heads(x: Tensor, weight: Tensor, heads: int) -> Tensor:
        """In float64."""
        norm = RMSNorm(x.shape[1], EPS).to(DEVICE)
        norm.weight.data = weight
        with Float64():
            return norm(x).unflatten(1, (heads, -1)).transpose(0, 1)

    @staticmethod
    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`rotate`, in float64."""
        with Float64():
            return rotate(x, cos, sin)

    @pytest.mark.parametrize(("length", "heads", "size"), [(37, 12, 128), (37, 6, 32), (5, 3, 16), (6, 2, 96)])
    @pytest.mark.parametrize("rotates", [True, False])
    def test_rows_of_the_cache_are_written_and_no_others(
        self, length: int, heads: int, size: int, rotates: bool
    ) -> None:
        width, first = heads * size, 3
        qkv = random(length, 3 * width + 16)[:, : 3 * width]
        (q_weight, k_weight), (cos, sin) = random(2, width, seed=1), random(2, length, size // 2, seed=2)
        queries = torch.empty(length, heads, size, device=DEVICE).transpose(0, 1)
        keys, values = torch.full((2, heads, length + 9, size), 7.0, device=DEVICE)
        norm_rotate_write(
            qkv, q_weight, k_weight, cos, sin, queries, keys, values, first_row=first, eps=EPS, rotate_keys=rotates
        )
        q, k, v = qkv.chunk(3, 1)
        k = self.heads(k, k_weight, heads)
        assert error(queries, self.turned(self.heads(q, q_weight, heads), cos, sin)) < gamma(width)
        assert error(keys[:, first : first + length], self.turned(k, cos, sin) if rotates else k) < gamma(width)
        assert values[:, first : first + length].equal(v.unflatten(1, (heads, -1)).transpose(0, 1))
        for cache in (keys, values):
            assert (cache[:, :first] == 7).all()
            assert (cache[:, first + length :] == 7).all()

    def test_a_cache_may_have_its_heads_inside(self) -> None:
        qkv, weight, (cos, sin) = random(11, 3 * 192), random(192, seed=1), random(2, 11, 16, seed=2)
        queries = torch.empty(6, 11, 32, device=DEVICE)
        keys, values = torch.zeros(2, 20, 6, 32, device=DEVICE).transpose(1, 2)
        norm_rotate_write(qkv, weight, weight, cos, sin, queries, keys, values, first_row=9, eps=EPS, rotate_keys=True)
        assert error(keys[:, 9:], self.turned(self.heads(qkv[:, 192:384], weight, 6), cos, sin)) < gamma(192)
        assert not keys[:, :9].any()

    def test_bfloat16_is_rounded_once(self) -> None:
        qkv, weight = random(11, 3 * 1536, dtype=torch.bfloat16), random(1536, dtype=torch.bfloat16, seed=1)
        cos, sin = random(2, 11, 64, seed=2)
        queries, keys, values = torch.zeros(3, 12, 11, 128, dtype=torch.bfloat16, device=DEVICE)
        norm_rotate_write(qkv, weight, weight, cos, sin, queries, keys, values, first_row=0, eps=EPS, rotate_keys=True)
        for got, x in zip((queries, keys), qkv.float().chunk(3, 1), strict=False):
            assert bfloat16_error(got, self.turned(self.heads(x, weight.float(), 12), cos, sin)) <= 1
        assert values.equal(qkv[:, 3072:].unflatten(1, (12, -1)).transpose(0, 1))

    def test_fp8_is_rounded_once_to_multiples_of_the_scales(self) -> None:
        qkv, weight, (cos, sin) = random(11, 3 * 192), random(192, seed=1), random(2, 11, 16, seed=2)
        queries, keys, values = torch.zeros(3, 6, 11, 32, device=DEVICE)
        norm_rotate_write(qkv, weight, weight, cos, sin, queries, keys, values, first_row=0, eps=EPS, rotate_keys=True)
        scales = torch.tensor([0.02, 0.01, 0.001], device=DEVICE)  # the largest values are out of range
        small = torch.zeros(3, 6, 11, 32, dtype=torch.float8_e4m3fn, device=DEVICE)
        norm_rotate_write(qkv, weight, weight, cos, sin, *small, first_row=0, eps=EPS, rotate_keys=True, scales=scales)
        for got, wanted, scale in zip(small, (queries, keys, values), scales, strict=True):
            rounded = (wanted / scale).clamp(-448, 448)
            assert ((got.float() - rounded).abs() <= rounded.abs().clamp_min(2**-6) * 2**-4 * (1 + 16 * FEW)).all()
        assert small[2].float().abs().max() == 448

    def test_fp8_keys_keep_their_scale_when_they_are_rotated(self) -> None:
        keys, angles = random(3, 41, 16), random(41, 8, seed=1)
        small = (keys * 60).to(torch.float8_e4m3fn)
        small[0, 0, :2] = 448  # a pair that comes to more than there is
        out = torch.empty_like(small)
        rotate_keys(small, angles.cos(), angles.sin(), out)
        wanted = self.turned(small.float(), angles.cos(), angles.sin()).clamp(-448, 448)
        assert ((out.double() - wanted).abs() <= wanted.abs().clamp_min(2**-6) * 2**-4 + 448 * FEW).all()

    @pytest.mark.parametrize("size", [128, 96, 16])
    def test_stored_keys_are_rotated_into_another_tensor_or_in_place(self, size: int) -> None:
        keys, (cos, sin) = random(3, 100, size)[:, :41], random(2, 41, size // 2, seed=1)
        wanted = self.turned(keys, cos, sin)
        out = torch.empty(41, 3, size, device=DEVICE).transpose(0, 1)
        rotate_keys(keys, cos, sin, out)
        rotate_keys(keys, cos, sin, keys)
        assert error(out, wanted) < FEW
        assert error(keys, wanted) < FEW


class TestNormSiLU:
    @pytest.mark.parametrize("channels", [96, 384, 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_it_fills_the_last_frames_of_a_longer_tensor(self, channels: int, dtype: torch.dtype) -> None:
        x = random(2, channels, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last_3d)
        out = torch.full((2, channels, 5, 5, 7), 7.0, dtype=dtype, device=DEVICE)
        out = out.to(memory_format=torch.channels_last_3d)
        norm = decoder.RMSNorm(channels).to(DEVICE)
        norm.gamma.data = random(channels, 1, 1, 1, seed=1).to(dtype).float()
        norm_silu(x, norm.gamma.to(dtype), out[:, :, 2:])
        with Float64():
            wanted = F.silu(norm(x.float()))
        assert bfloat16_error(out[:, :, 2:].bfloat16(), wanted) <= 1
        assert error(out[:, :, 2:], wanted) < (gamma(channels) if dtype == torch.float32 else 2**-8)
        assert (out[:, :, :2] == 7).all()

    def test_fp8_is_multiples_of_the_scale(self) -> None:
        x = random(1, 96, 3, 5, 7).to(memory_format=torch.channels_last_3d)
        wanted = torch.empty_like(x)
        out = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        norm_silu(x, random(96, seed=1), wanted)
        norm_silu(x, random(96, seed=1), out, 0.01)  # the largest are out of range
        rounded = (wanted / 0.01).clamp(-448, 448)
        assert ((out.float() - rounded).abs() <= rounded.abs().clamp_min(2**-6) * 2**-4 * (1 + 16 * FEW)).all()
        assert out.float().max() == 448

    @pytest.mark.parametrize("keep", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_to_be_added_is_added_before_and_kept_if_asked_for(self, keep: bool, dtype: torch.dtype) -> None:
        channels = 40
        x, longer = (random(2, channels, frames, 5, 7, seed=frames, dtype=dtype) for frames in (3, 5))
        x, added = (part.to(memory_format=torch.channels_last_3d) for part in (x, longer))
        added = added[:, :, 1:4]
        bias, gains = random(channels, seed=8, dtype=dtype), random(channels, seed=9, dtype=dtype)
        before, out = x.clone(), torch.empty_like(x)
        norm_silu(x, gains, out, bias=bias, added=added, keep=keep)
        norm = decoder.RMSNorm(channels).to(DEVICE)
        norm.gamma.data = gains.view(channels, 1, 1, 1).float()
        with Float64():
            total = before.double() + bias.view(channels, 1, 1, 1).double() + added.double()
            wanted = F.silu(norm(total))
        rounding = gamma(channels) if dtype == torch.float32 else 2**-8
        assert error(out, wanted) < rounding
        assert error(x, total if keep else before) < rounding

    def test_positions_of_zeros_stay_zeros(self) -> None:
        x = torch.zeros(1, 96, 1, 3, 3, device=DEVICE).to(memory_format=torch.channels_last_3d)
        norm_silu(x, random(96), x)
        assert not x.any()
