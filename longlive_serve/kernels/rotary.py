# SPDX-License-Identifier: Apache-2.0
"""RMS norm, RoPE and split into heads, from the joint projection of queries, keys and values to attention's inputs.

Source: docs/semantics.md, sections 2.1 (step 2) and 2.2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longlive_serve.kernels.norms import inverse_rms
from longlive_serve.kernels.quantize import scaled
from longlive_serve.kernels.tiles import tile_of


def norm_rotate_write(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_out: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    first_row: int,
    eps: float,
    rotate_keys: bool,
    scales: Tensor | None = None,
) -> None:
    """Fill q_out [H, L, d] and the rows first_row to first_row + L of k_cache and v_cache [H, T, d], in place.

    qkv [L, 3D], rows contiguous: each token's query, key and value. Queries and keys: RMS norm over D = H * d, times
    their weight [D], then in each head the pairs (2i, 2i + 1) rotated by the angles whose cosines and sines are cos and
    sin, float32 [L, d/2], contiguous; keys only with `rotate_keys`. Outputs may have any strides with d contiguous.
    With scales float32 [3], of queries, keys and values, outputs are divided by them and stored as FP8 (E4M3).
    """
    heads, length, size = q_out.shape
    width = heads * size
    k_out, v_out = (cache[:, first_row : first_row + length] for cache in (k_cache, v_cache))
    assert qkv.shape == (length, 3 * width), f"{qkv.shape}, not {(length, 3 * width)}"
    assert qkv.stride(1) == 1, f"rows of stride {qkv.stride(1)}"
    _check(cos, sin, q_out, k_out, v_out)
    tile = tile_of(width, length)
    _norm_rotate_write_kernel[(triton.cdiv(length, tile.rows),)](
        qkv, q_weight, k_weight, cos, sin, q_out, k_out, v_out, length, width, qkv.stride(0),
        *q_out.stride()[:2], *k_out.stride()[:2], *v_out.stride()[:2], eps, scales,
        ROTATE_KEYS=rotate_keys, SIZE=size, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip


def rotate_keys(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate the pairs (2i, 2i + 1) of keys [H, T, d] into out, of the same shape, which may be keys itself.

    cos, sin float32 [T, d/2], contiguous. keys and out may have any strides with d contiguous. FP8 keys keep their
    scale. Source: docs/semantics.md, sections 2.2 and 7.
    """
    heads, length, size = keys.shape
    _check(cos, sin, keys, out)
    tile = tile_of(size, length)
    _rotate_keys_kernel[(triton.cdiv(length, tile.rows), heads)](
        keys, cos, sin, out, length, *keys.stride()[:2], *out.stride()[:2],
        SIZE=size, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip


def _check(cos: Tensor, sin: Tensor, *heads: Tensor) -> None:
    _, length, size = heads[0].shape
    for tensor in heads:
        assert tensor.shape == heads[0].shape, f"{tensor.shape}, not {heads[0].shape}"
        assert tensor.stride(2) == 1, f"heads' rows of stride {tensor.stride(2)}"
    for tensor in (cos, sin):
        assert tensor.shape == (length, size // 2), f"angles {tensor.shape}, not {(length, size // 2)}"
        assert tensor.is_contiguous(), f"angles of strides {tensor.stride()}"


@triton.jit
def _rotate(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pairs of x [ROWS, BLOCK], rotated by the angles of cos and sin [ROWS, BLOCK / 2]."""
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))


@triton.jit
def _normed(x_ptr, weight_ptr, columns, inside, width, eps):
    x = tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    return x * inverse_rms(x, width, eps) * weight


@triton.jit
def _norm_rotate_write_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, v_ptr, length, width, stride,
    q_head, q_row, k_head, k_row, v_head, v_row, eps, scales_ptr,
    ROTATE_KEYS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < length) & (columns < width)
    pairs = tl.arange(0, BLOCK // 2)[None, :]
    in_pairs = (rows < length) & (pairs < width // 2)
    angles = rows * (SIZE // 2) + pairs % (SIZE // 2)
    cos = tl.load(cos_ptr + angles, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=in_pairs, other=0.0)
    heads = (columns // SIZE).to(tl.int64)
    offs_d = columns % SIZE
    qkv_ptr += rows * stride
    q = _rotate(_normed(qkv_ptr, q_weight_ptr, columns, inside, width, eps), cos, sin, ROWS, BLOCK)
    if scales_ptr is not None:
        q = scaled(q, tl.load(scales_ptr))
    tl.store(q_ptr + heads * q_head + rows * q_row + offs_d, q, mask=inside)
    k = _normed(qkv_ptr + width, k_weight_ptr, columns, inside, width, eps)
    if ROTATE_KEYS:
        k = _rotate(k, cos, sin, ROWS, BLOCK)
    if scales_ptr is not None:
        k = scaled(k, tl.load(scales_ptr + 1))
    tl.store(k_ptr + heads * k_head + rows * k_row + offs_d, k, mask=inside)
    v = tl.load(qkv_ptr + 2 * width + columns, mask=inside, other=0.0)
    if scales_ptr is not None:
        v = scaled(v.to(tl.float32), tl.load(scales_ptr + 2))
    tl.store(v_ptr + heads * v_head + rows * v_row + offs_d, v, mask=inside)


@triton.jit
def _rotate_keys_kernel(
    keys_ptr, cos_ptr, sin_ptr, out_ptr, length, keys_head, keys_row, out_head, out_row,
    SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < length) & (columns < SIZE)
    pairs = tl.arange(0, BLOCK // 2)[None, :]
    in_pairs = (rows < length) & (pairs < SIZE // 2)
    cos = tl.load(cos_ptr + rows * (SIZE // 2) + pairs, mask=in_pairs, other=0.0)
    sin = tl.load(sin_ptr + rows * (SIZE // 2) + pairs, mask=in_pairs, other=0.0)
    keys = tl.load(keys_ptr + head * keys_head + rows * keys_row + columns, mask=inside, other=0.0).to(tl.float32)
    keys = _rotate(keys, cos, sin, ROWS, BLOCK)
    if out_ptr.dtype.element_ty == tl.float8e4nv:
        keys = scaled(keys, 1.0)  # clamp only
    tl.store(out_ptr + head * out_head + rows * out_row + columns, keys, mask=inside)
