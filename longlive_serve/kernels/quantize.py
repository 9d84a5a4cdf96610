# SPDX-License-Identifier: Apache-2.0
"""Row-wise quantization to FP8 (E4M3), one scale per row, for FP8 GEMMs with row-wise scales; GELU.

Other kernels also end with `scale_of` and `scaled` if an FP8 layer follows them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longlive_serve.kernels.tiles import tile_of

LARGEST = tl.constexpr(448.0)  # of E4M3
TINY = tl.constexpr(1e-12)  # replaces the largest value of a row of zeros, so that its scale has an inverse


class QuantizedRows(NamedTuple):
    """A matrix [L, N], equal to values * scales."""

    values: Tensor
    """float8_e4m3fn [L, N], contiguous."""
    scales: Tensor
    """float32 [L, 1]: the largest absolute value of each row / 448."""


def quantize_rows(x: Tensor) -> QuantizedRows:
    """Quantize x [L, N], any float dtype, rows contiguous, to FP8: the scale maps a row's largest value to 448."""
    assert x.stride(1) == 1, f"rows of stride {x.stride(1)}"
    values, scales = output_for(x, fp8=True)
    assert scales is not None
    length, width = x.shape
    tile = tile_of(width, length)
    _quantize_kernel[(triton.cdiv(length, tile.rows),)](
        x, values, scales, length, width, x.stride(0), ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.num_warps
    )
    return QuantizedRows(values, scales)


def gelu(x: Tensor, *, fp8: bool = False) -> Tensor | QuantizedRows:
    """GELU (tanh approximation) of x [L, N], contiguous, in x's dtype or, with `fp8`, quantized by rows.

    A row is split into two blocks, each a power of two: nearly half of a single block for 8960 numbers would be
    masked. Source: docs/semantics.md, section 2.1, step 6.
    """
    assert x.is_contiguous(), f"strides {x.stride()}"
    values, scales = output_for(x, fp8)
    length, width = x.shape
    tile = tile_of(width, length)
    head = tile.block // 2
    rest = triton.next_power_of_2(width - head)
    _gelu_kernel[(triton.cdiv(length, tile.rows),)](
        x, values, scales, length, width, ROWS=tile.rows, HEAD=head, REST=rest, num_warps=tile.num_warps
    )
    return values if scales is None else QuantizedRows(values, scales)


def output_for(x: Tensor, fp8: bool) -> tuple[Tensor, Tensor | None]:
    """Allocate a result shaped like x [L, N]: the values and, for FP8, the scales of its rows."""
    if not fp8:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), None
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return values, torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)


@triton.jit
def scale_of(largest):
    """The scales [ROWS, 1] of rows whose largest absolute values [ROWS] are given."""
    return (tl.maximum(largest, TINY) / LARGEST)[:, None]


@triton.jit
def scaled(x, scale):
    """x [ROWS, BLOCK] / scale [ROWS, 1], clamped to the range of E4M3. One division per row."""
    return tl.clamp(x * (1.0 / scale), -LARGEST, LARGEST)


@triton.jit
def _quantize_kernel(x_ptr, values_ptr, scales_ptr, length, width, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < length) & (columns < width)
    x = tl.load(x_ptr + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(x), axis=1))
    tl.store(scales_ptr + rows, scale, mask=rows < length)
    tl.store(values_ptr + rows * width + columns, scaled(x, scale), mask=inside)


@triton.jit
def _gelu(x):
    """0.5 x (1 + tanh(u)) is x sigmoid(2u); 2 sqrt(2 / pi) is 1.59577."""
    return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def _gelu_kernel(
    x_ptr, values_ptr, scales_ptr, length, width, ROWS: tl.constexpr, HEAD: tl.constexpr, REST: tl.constexpr
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, HEAD)[None, :]
    rest = HEAD + tl.arange(0, REST)[None, :]
    inside = (rows < length) & (columns < width)
    inside_rest = (rows < length) & (rest < width)
    x_ptr += rows * width
    values_ptr += rows * width
    y = _gelu(tl.load(x_ptr + columns, mask=inside, other=0.0).to(tl.float32))
    z = _gelu(tl.load(x_ptr + rest, mask=inside_rest, other=0.0).to(tl.float32))
    if scales_ptr is not None:
        scale = scale_of(tl.maximum(tl.max(tl.abs(y), axis=1), tl.max(tl.abs(z), axis=1)))
        tl.store(scales_ptr + rows, scale, mask=rows < length)
        y = scaled(y, scale)
        z = scaled(z, scale)
    tl.store(values_ptr + columns, y, mask=inside)
    tl.store(values_ptr + rest, z, mask=inside_rest)
