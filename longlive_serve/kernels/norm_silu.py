# SPDX-License-Identifier: Apache-2.0
"""RMS norm over the channels and SiLU, which precede every VAE convolution, fused with the additions before them.

Source: docs/semantics.md, section 8.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from longlive_serve.kernels.quantize import scaled
from longlive_serve.kernels.tiles import tile_of


def norm_silu(
    x: Tensor,
    gamma: Tensor,
    out: Tensor,
    scale: float | None = None,
    *,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    keep: bool = False,
) -> None:
    """out = SiLU(s / max(||s||, 1e-12) * sqrt(C) * gamma) with s = x + bias + added, normed over the channels.

    With `scale`, out is divided by it and stored as FP8 (E4M3). With `keep`, s is stored in x.

    x, out and added are [B, C, T, H, W] in channels_last_3d: the channels of a position are contiguous, and so are the
    positions of a frame. Frames may have any stride, so out can be a slice of a longer tensor. gamma and bias: [C].
    """
    batch, channels, frames, height, width = x.shape
    other = x if added is None else added
    for tensor in (x, out, other):
        assert tensor.shape == x.shape, f"{tensor.shape}, not {x.shape}"
        assert tensor[0, :, 0].permute(1, 2, 0).is_contiguous(), f"strides {tensor.stride()}"
    positions = height * width
    tile = tile_of(channels, positions)
    _norm_silu_kernel[(triton.cdiv(positions, tile.rows), frames, batch)](
        x, gamma, out, bias, added, positions, channels, channels**0.5, x.stride(0), x.stride(2), out.stride(0),
        out.stride(2), other.stride(0), other.stride(2), scale, KEEP=keep, ROWS=tile.rows, BLOCK=tile.block,
        num_warps=tile.num_warps,
    )  # fmt: skip


@triton.jit
def _norm_silu_kernel(
    x_ptr, gamma_ptr, out_ptr, bias_ptr, added_ptr, positions, channels, root, x_batch, x_frame, out_batch, out_frame,
    added_batch, added_frame, scale, KEEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < positions) & (columns < channels)
    frame = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    offs = rows.to(tl.int64) * channels + columns
    x_ptr += batch * x_batch + frame * x_frame
    x = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + columns, mask=columns < channels, other=0.0).to(tl.float32)
    if added_ptr is not None:
        added_ptr += batch * added_batch + frame * added_frame
        x += tl.load(added_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if KEEP:
        tl.store(x_ptr + offs, x, mask=inside)
    gamma = tl.load(gamma_ptr + columns, mask=columns < channels, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, axis=1))
    y = x * (root / tl.maximum(norm, 1e-12))[:, None] * gamma
    y *= tl.sigmoid(y)
    if scale is not None:
        y = scaled(y, scale)
    tl.store(out_ptr + batch * out_batch + frame * out_frame + offs, y, mask=inside)
