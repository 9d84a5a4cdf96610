# SPDX-License-Identifier: Apache-2.0
"""Attention without a mask, forward only, in the dtype of its inputs or in FP8; the softmax is computed online.

Source: docs/semantics.md, section 2.1, steps 3 and 5; the algorithm is that of FlashAttention-2.
On a GPU the first call for a head size and dtype autotunes the tile sizes: make it before capturing a CUDA graph.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longlive_serve.kernels.quantize import LARGEST
from longlive_serve.kernels.tiles import interpreted

LOG2_E = tl.constexpr(math.log2(math.e))
LOG2_LARGEST = math.log2(LARGEST.value)
ALIGNED = 16  # bytes: alignment of FP8 rows, for wide loads


def attention(q: Tensor, k: Tensor, v: Tensor, *, key_bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + key_bias) v over all keys.

    q [H, L, d], k and v [H, T, d], of any strides with d contiguous; key_bias float32 [T], contiguous and finite.
    Returns [L, H * d], contiguous, in the inputs' dtype.
    """
    assert q.dtype == k.dtype == v.dtype, f"{q.dtype}, {k.dtype} and {v.dtype}"
    assert q.stride(2) == k.stride(2) == v.stride(2) == 1, "rows of heads are not contiguous"
    return _attend(q, k, v, q.dtype, bias=key_bias)


def attention_fp8(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
    """As `attention`, on FP8 (E4M3) inputs, with float32 accumulation.

    scales float32 [3], contiguous: the scales of q, k and v. Returns float8_e4m3fn [L, H * d] with the scale of v: the
    softmax weights add up to 1, so no output is larger than the largest value. The softmax weights, at most 1, are
    multiplied by 448 to use the range of E4M3.
    """
    assert q.dtype == k.dtype == v.dtype == torch.float8_e4m3fn, f"{q.dtype}, {k.dtype} and {v.dtype}"
    assert scales.shape == (3,), f"scales {scales.shape}"
    assert scales.is_contiguous(), f"scales of stride {scales.stride()}"
    return _attend(q, k, _keys_contiguous(v), q.dtype, scales=scales)


def _keys_contiguous(v: Tensor) -> Tensor:
    """v [H, T, d] with T contiguous: Hopper's FP8 GEMM needs both operands contiguous along the summed dim."""
    heads, length, size = v.shape
    padded = triton.cdiv(length, ALIGNED) * ALIGNED
    out = torch.empty(heads, size, padded, dtype=v.dtype, device=v.device)[:, :, :length].transpose(1, 2)
    return out.copy_(v)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, *, bias: Tensor | None = None, scales: Tensor | None = None
) -> Tensor:
    heads, length, size = q.shape
    keys = k.shape[1]
    assert k.shape == v.shape == (heads, keys, size), f"{q.shape}, {k.shape} and {v.shape}"
    assert bias is None or (bias.shape == (keys,) and bias.dtype == torch.float32), "key_bias"
    out = torch.empty(length, heads * size, dtype=dtype, device=q.device)

    def grid(chosen: dict[str, Any]) -> tuple[int, int]:
        return triton.cdiv(length, chosen["BLOCK_M"]), heads

    _attention_kernel[grid](
        q, k, v, bias, scales, out, length, keys,
        *q.stride()[:2], *k.stride()[:2], *v.stride(), LOG2_E.value / size**0.5,
        SIZE=size, BLOCK_D=max(32, triton.next_power_of_2(size)), SHIFT=0.0 if scales is None else LOG2_LARGEST,
    )  # fmt: skip
    return out


def _configs() -> list[triton.Config]:
    if interpreted():
        return [triton.Config({"BLOCK_M": 64, "BLOCK_N": 64})]
    tiles = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (32, 32, 4, 2)]
    return [
        triton.Config({"BLOCK_M": rows, "BLOCK_N": keys}, num_warps=warps, num_stages=stages)
        for rows, keys, warps, stages in tiles
    ]


def _suited(configs: list[triton.Config], arguments: dict[str, Any], **_: Any) -> list[triton.Config]:
    """float32, used in tests only, gets the small tile: most other tiles would exceed the shared memory."""
    wide = arguments["q_ptr"].dtype == torch.float32
    return [config for config in configs if (config.kwargs["BLOCK_M"] == 32) == wide]


@triton.jit
def _over_keys(
    acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, k_row, v_row, v_col, first, last, scale,
    SIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SHIFT: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Add the keys [first, last) to the accumulator acc [M, D] and the softmax denominator l_i [M], both relative to
    the running maximum of the logits m_i [M]. Without TAIL all blocks of keys are full."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    keys = first + tl.arange(0, BLOCK_N)
    k_ptr += keys.to(tl.int64)[:, None] * k_row + offs_d
    v_ptr += keys.to(tl.int64)[:, None] * v_row + offs_d * v_col
    for start in range(first, last, BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < last
        if TAIL or SIZE < BLOCK_D:
            present = inside[:, None] & (offs_d < SIZE)
            k = tl.load(k_ptr, mask=present, other=0.0)
            v = tl.load(v_ptr, mask=present, other=0.0)
        else:
            k = tl.load(k_ptr)
            v = tl.load(v_ptr)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + start + tl.arange(0, BLOCK_N), mask=inside, other=0.0)
            logits += (bias * (LOG2_E / scale))[None, :]
        if TAIL:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(logits, axis=1) * scale)
        p = tl.exp2(logits * scale - (m_new - SHIFT)[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee", max_num_imprecise_acc=BLOCK_N)
        m_i = m_new
        k_ptr += BLOCK_N * k_row
        v_ptr += BLOCK_N * v_row
    return acc, l_i, m_i


@triton.autotune(_configs(), key=["SIZE"], prune_configs_by={"early_config_prune": _suited})
@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, scales_ptr, out_ptr, length, keys, q_head, q_row, k_head, k_row,
    v_head, v_row, v_col, scale,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr, SHIFT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    heads = tl.num_programs(1)
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < length) & (offs_d < SIZE)
    q_ptr += head.to(tl.int64) * q_head
    q = tl.load(q_ptr + rows.to(tl.int64) * q_row + offs_d, mask=inside, other=0.0)
    if scales_ptr is not None:
        scale *= tl.load(scales_ptr) * tl.load(scales_ptr + 1)
    k_ptr += head.to(tl.int64) * k_head
    v_ptr += head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    whole = keys // BLOCK_N * BLOCK_N
    acc, l_i, m_i = _over_keys(
        acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, k_row, v_row, v_col, 0, whole, scale,
        SIZE, BLOCK_N, BLOCK_D, SHIFT, False,
    )  # fmt: skip
    acc, l_i, m_i = _over_keys(
        acc, l_i, m_i, q, k_ptr, v_ptr, bias_ptr, k_row, v_row, v_col, whole, keys, scale,
        SIZE, BLOCK_N, BLOCK_D, SHIFT, True,
    )  # fmt: skip
    out = acc / l_i[:, None]
    if scales_ptr is not None:
        out = tl.clamp(out, -LARGEST, LARGEST)  # p is rounded, l_i is not: out may exceed the range
    tl.store(out_ptr + (rows.to(tl.int64) * heads + head) * SIZE + offs_d, out, mask=inside)
