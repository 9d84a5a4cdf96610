# SPDX-License-Identifier: Apache-2.0
"""The attention kernels, beside PyTorch's own attention in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_serve.backends.fused import attention_autotune
from longlive_serve.backends.fused.attention_autotune import example
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.config.presets import PRESETS
from longlive_serve.kernels.attention import attention, attention_fp8
from tests.fakes.triton_on_cpu import error, random
from tests.support.tolerance import assert_as_near, gamma

pytestmark = pytest.mark.numeric

TINY, CPU = PRESETS["tiny"], torch.device("cpu")
SHAPES = [  # heads, queries, keys, size of a head
    (2, 64, 128, 128),  # whole tiles of the interpreter's
    (2, 70, 150, 128),
    (3, 1, 1, 32),
    (1, 129, 65, 64),
    (2, 33, 40, 16),
    (1, 33, 100, 96),
]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, H * d] in float64."""
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double()).transpose(0, 1).flatten(1)


def in_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[L, H * d] by PyTorch."""
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


def inputs(heads: int, length: int, keys: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries with heads inside, as the projection gives them; keys and values in a longer cache."""
    q = random(length, heads, size, dtype=dtype).transpose(0, 1)
    return [q, *(random(heads, keys + 5, size, dtype=dtype, seed=seed)[:, :keys] for seed in (1, 2))]


@pytest.mark.parametrize("kind", [RuntimeError, ImportError, ValueError, Exception])
def test_a_kernel_that_fails_or_is_wrong_at_a_size_that_is_served_is_not_chosen(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Triton's and cuDNN's errors are no RuntimeError. Each trial gives the seconds that it takes."""
    monkeypatch.setattr(attention_autotune, "median_seconds", lambda call, *_: call().item())
    usual, *others = attention_autotune.sizes(TINY)
    assert len(others) == 7

    def trial(seconds: float, wrong: tuple[int, int] | None = None) -> attention_autotune.Candidate:
        def run(queries: int, keys: int) -> Tensor:
            if wrong == (0, 0):
                raise kind("there is no kernel")
            return torch.tensor(math.nan if (queries, keys) == wrong else seconds)

        return attention_autotune.Candidate(run=run, head=lambda out: out / out)

    def chosen(**trials: attention_autotune.Candidate) -> str | None:
        return attention_autotune._select_fastest("attention", trials, TINY, lambda queries, keys: torch.ones(()), 0.1)

    there = {"slow": trial(2.0), "fast": trial(1.0)}
    assert chosen(broken=trial(0.5, (0, 0)), **there) == "fast"
    for size in (usual, others[-1]):
        assert chosen(wrong=trial(0.5, size), **there) == "fast"
        assert f"attention: wrong is wrong: error inf with {size[0]} queries and {size[1]} keys" in caplog.text
    assert chosen(broken=trial(0.5, (0, 0))) is None


@pytest.mark.parametrize("name", ["attention", "attention in FP8"])
def test_what_is_right_is_told_from_what_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's attention, or our own in FP8, beside one that leaves out the last key."""
    tried: dict[str, tuple[dict[str, attention_autotune.Candidate], list[float]]] = {}

    def note(label: str, candidates: Any, config: object, exact: Any, tolerance: float) -> str:
        size = attention_autotune.sizes(TINY)[1]
        right, wrong = (candidate.head(candidate.run(*size)) for candidate in candidates.values())
        tried[label] = candidates, [relative_error(out, exact(*size)) / tolerance for out in (right, wrong)]
        return "right"

    cuda: Any = SimpleNamespace(type="cuda")
    monkeypatch.setattr(attention_autotune, "example", lambda config, _, *rest: example(config, CPU, torch.float32, 12))
    monkeypatch.setattr(attention_autotune, "_select_fastest", note)
    if name == "attention":
        sdpa = F.scaled_dot_product_attention
        fakes = {"right": sdpa, "wrong": lambda q, k, v: sdpa(q, k[:, :, 1:], -v[:, :, 1:])}
        monkeypatch.setattr(attention_autotune, "KERNELS", fakes)
        assert attention_autotune.select_attention(TINY, cuda, torch.float32) is sdpa
    else:
        small = {"right": attention_fp8, "wrong": lambda q, k, v, scales: attention_fp8(q, v, k, scales)}
        monkeypatch.setattr(attention_autotune, "fp8_kernels", lambda _: small)
        assert attention_autotune.select_fp8_attention(TINY, cuda) is attention_fp8
    _, (right, wrong) = tried[name]
    assert right < 0.5
    assert wrong > 5


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_as_exact_as_pytorchs(shape: tuple[int, int, int, int]) -> None:
    q, k, v = inputs(*shape)
    out = attention(q, k, v)
    assert out.is_contiguous()
    assert_as_near(out, in_float32(q, k, v), exact(q, k, v))


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_16_bit_result_is_off_by_its_rounding_and_that_of_the_weights(dtype: torch.dtype, step: float) -> None:
    q, k, v = inputs(2, 70, 150, 128, dtype)
    out = attention(q, k, v)
    assert out.dtype == dtype
    assert error(out, exact(q, k, v)) < 2 * step


def test_a_bias_of_log_n_stands_for_a_key_that_is_there_n_times() -> None:
    q, k, v = inputs(2, 33, 70, 32)
    times = torch.arange(70, device=q.device) % 5 + 1
    out = attention(q, k, v, key_bias=times.float().log())
    repeated = [x.repeat_interleave(times, 1) for x in (k, v)]
    assert_as_near(out, in_float32(q, *repeated), exact(q, *repeated))


def test_one_pad_key_stands_for_all_of_a_prompts_padding() -> None:
    q, k, v = inputs(2, 33, 512, 32)
    k[:, 20:], v[:, 20:] = k[:, 20:21].clone(), v[:, 20:21].clone()
    bias = torch.zeros(21, device=q.device)
    bias[20] = math.log(512 - 20)
    assert_as_near(attention(q, k[:, :21], v[:, :21], key_bias=bias), in_float32(q, k, v), exact(q, k, v))


def test_large_logits_and_zeros_do_no_harm() -> None:
    q, k, v = inputs(2, 33, 70, 32)
    q[0] *= 300
    k[0] *= 300
    q[1], k[1] = 0, 0
    mean = v[1].double().mean(0).expand(33, -1)
    # Where all weights are the same, a sum is off by its values' rounding to FP8, and by that of the result.
    for kernel, tolerance in ((attention, gamma(70) * float(v[1].abs().max() / mean.abs().max())), (in_fp8, 2 * 2**-4)):
        out = kernel(q, k, v)
        assert out.isfinite().all()
        assert error(out[:, 32:], mean) < tolerance
    highest = (q[0].double() @ k[0].double().t() / 32**0.5).topk(2).values
    assert (highest[:, 0] - highest[:, 1]).min() > 20, "or the rounding of logits of 1e6 would show"
    assert error(attention(q, k, v)[:, :32], exact(q, k, v)[:, :32]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_is_off_by_the_rounding_of_its_inputs_weights_and_result(shape: tuple[int, int, int, int]) -> None:
    *small, scales = given = quantized(*inputs(*shape))
    out = attention_fp8(*given)
    assert out.dtype == torch.float8_e4m3fn
    assert out.is_contiguous()
    rounded = [x.float() * scale for x, scale in zip(small, scales, strict=True)]
    assert error(out.float() * scales[2], exact(*rounded)) < 2**-4 + 2**-4  # at most, if all erred alike
    assert error(out.float() * scales[2], exact(*inputs(*shape))) < 0.2


def test_the_result_is_in_the_range_of_fp8_where_all_values_are_the_largest() -> None:
    q, k, v = inputs(1, 33, 70, 32)
    small = quantized(q, k, torch.ones_like(v))
    assert (attention_fp8(*small).float() - 448).abs().max() <= 32  # the next number below


def test_fp8_takes_numbers_of_any_size() -> None:
    q, k, v = inputs(2, 33, 70, 32)
    assert torch.equal(in_fp8(q * 2**-10, k * 2**10, v * 2**13), in_fp8(q, k, v) * 2**13)  # without any rounding


def quantized(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP8, and the scales that map the largest numbers to the format's."""
    scales = torch.stack([x.float().abs().max() / 448 for x in (q, k, v)])
    small = [(x.float() / scale).to(torch.float8_e4m3fn) for x, scale in zip((q, k, v), scales, strict=True)]
    return small[0], small[1], small[2], scales


def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    small = quantized(q, k, v)
    return attention_fp8(*small).float() * small[3][2]
