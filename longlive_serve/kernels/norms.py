# SPDX-License-Identifier: Apache-2.0
"""The DiT's norms over whole tokens, fused with the operations before and after them.

Source: docs/semantics.md, sections 2.1 and 2.3. Only results are rounded, intermediate values are not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longlive_serve.kernels.quantize import QuantizedRows, output_for, scale_of, scaled
from longlive_serve.kernels.tiles import tile_of


def residual_norm(
    x: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    one_plus: bool,
    fp8: bool = False,
) -> Tensor | QuantizedRows:
    """Gated residual addition and the norm of the next part of a block. Source: docs/semantics.md, section 2.1.

    If there is an update [L, D], contiguous, x [L, D], contiguous, becomes x + gate * update in place; gate is [D], or
    None for 1. Returns LayerNorm(x) * scale + shift [L, D], of x as stored, in x's dtype or, with `fp8`, quantized by
    rows. scale and shift [D]; with `one_plus` the factor is 1 + scale. The vectors have any float dtype.
    """
    assert x.is_contiguous(), f"strides {x.stride()}"
    assert update is None or (update.shape == x.shape and update.is_contiguous()), "update unlike x"
    values, scales = output_for(x, fp8)
    length, width = x.shape
    tile = tile_of(width, length)
    _residual_norm_kernel[(triton.cdiv(length, tile.rows),)](
        x, update, gate, scale, shift, values, scales, length, width, eps,
        ONE_PLUS=one_plus, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps,
    )  # fmt: skip
    return values if scales is None else QuantizedRows(values, scales)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the rows of x [L, D], which may be columns of a wider matrix.

    weight [D] -> [L, D], contiguous, in x's dtype. Source: docs/semantics.md, section 2.1, steps 2 and 5.
    """
    assert x.stride(1) == 1, f"rows of stride {x.stride(1)}"
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    length, width = x.shape
    tile = tile_of(width, length)
    _rms_norm_kernel[(triton.cdiv(length, tile.rows),)](
        x, weight, out, length, width, x.stride(0), eps, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps
    )
    return out


@triton.jit
def inverse_rms(x, width, eps):
    """1 / the root mean square [ROWS, 1] of rows x [ROWS, BLOCK], which are zero beyond their width."""
    return tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]


@triton.jit
def _residual_norm_kernel(
    x_ptr, update_ptr, gate_ptr, scale_ptr, shift_ptr, values_ptr, scales_ptr, length, width, eps,
    ONE_PLUS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    in_row = columns < width
    inside = (rows < length) & in_row
    x_ptr += rows * width + columns
    x = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    if update_ptr is not None:
        update = tl.load(update_ptr + rows * width + columns, mask=inside, other=0.0).to(tl.float32)
        if gate_ptr is not None:
            update *= tl.load(gate_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        stored = (x + update).to(x_ptr.dtype.element_ty)
        tl.store(x_ptr, stored, mask=inside)
        x = stored.to(tl.float32)
    centred = tl.where(in_row, x - (tl.sum(x, axis=1) / width)[:, None], 0.0)
    factor = tl.load(scale_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    if ONE_PLUS:
        factor += 1.0
    shift = tl.load(shift_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    y = centred * inverse_rms(centred, width, eps) * factor + shift
    if scales_ptr is not None:
        scale = scale_of(tl.max(tl.abs(y), axis=1))
        tl.store(scales_ptr + rows, scale, mask=rows < length)
        y = scaled(y, scale)
    tl.store(values_ptr + rows * width + columns, y, mask=inside)


@triton.jit
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, length, width, stride, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < length) & (columns < width)
    x = tl.load(x_ptr + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows * width + columns, x * inverse_rms(x, width, eps) * weight, mask=inside)
