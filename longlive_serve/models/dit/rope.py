# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over (time, row, column), in real arithmetic.

Called by the causal DiT and its backends. Source: docs/semantics.md, section 2.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_FRAMES = 1024  # positions in the reference's table: the base variant has none for later latent frames


def axis_angles(positions: int, pairs: int) -> Tensor:
    """Angles [positions, pairs] of one axis in float64: position * 10000^(-i / pairs)."""
    frequencies = torch.pow(10000.0, -torch.arange(pairs, dtype=torch.float64) / pairs)
    return torch.arange(positions, dtype=torch.float64)[:, None] * frequencies


def split_pairs(head_dim: int) -> tuple[int, int, int]:
    """The number of complex pairs of a head for time, rows and columns."""
    pairs = head_dim // 2
    return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


class RotaryTables:
    """Cosines and sines for one latent size: constants on one device, float32 (computed in float64)."""

    def __init__(
        self, head_dim: int, rows: int, columns: int, frames_per_chunk: int, device: torch.device | str = "cpu"
    ) -> None:
        time, row, column = split_pairs(head_dim)
        self.frames_per_chunk = frames_per_chunk
        self.tokens_per_chunk = frames_per_chunk * rows * columns
        row_angles = axis_angles(rows, row)[:, None].expand(rows, columns, row)
        column_angles = axis_angles(columns, column)[None].expand(rows, columns, column)
        space = torch.cat([row_angles, column_angles], -1).flatten(0, 1)  # [rows * columns, pairs]
        self._time = [part.float().to(device) for part in _cos_sin(axis_angles(MAX_FRAMES, time))]
        self._space = [part.float().to(device) for part in _cos_sin(space)]

    def of_chunks(self, chunks: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [tokens, head_dim / 2] of the tokens of these chunks, one chunk after the other.

        It slices tables on the device, without a synchronization.
        """
        cos, sin = (self._gather(time, space, chunks) for time, space in zip(self._time, self._space, strict=True))
        return cos, sin

    def _gather(self, time: Tensor, space: Tensor, chunks: Sequence[int]) -> Tensor:
        size = self.frames_per_chunk
        frames = torch.cat([time[chunk * size : (chunk + 1) * size] for chunk in chunks])
        in_time = frames[:, None].expand(-1, len(space), -1)
        in_space = space[None].expand(len(frames), -1, -1)
        return torch.cat([in_time, in_space], -1).flatten(0, 1)


def _cos_sin(angles: Tensor) -> tuple[Tensor, Tensor]:
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x [.., tokens, head_dim] by the angles [tokens, head_dim / 2]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)
