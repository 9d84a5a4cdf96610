# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing: many chunks of a video in one forward of the DiT, each with its context in a session.

Used by training. The frames of the forward are the clean chunks followed by the noisy ones; a mask replaces the KV
cache. A test compares the flows with those of chunk-by-chunk generation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longlive_serve.models.dit.causal_dit import CacheView, CausalDiT
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.dit.rope import RotaryTables, rotate


class TeacherForcingView(CacheView):
    """Replaces a session's cache, for a clean and a noisy chunk at each of `positions`."""

    def __init__(self, window: Window, tables: RotaryTables, positions: Sequence[int]) -> None:
        self.query_angles = tables.of_chunks([*positions, *positions])
        seen = chunk_mask(window, len(positions))
        rows = tables.tokens_per_chunk
        self.mask = seen.repeat_interleave(rows, 0).repeat_interleave(rows, 1).to(self.query_angles[0].device)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rotate(k, *self.query_angles), v


def chunk_mask(window: Window, chunks: int) -> Tensor:
    """bool [2 * chunks, 2 * chunks]: which chunks (columns) a chunk (row) attends to; clean ones first, then noisy."""
    mask = torch.zeros(2 * chunks, 2 * chunks, dtype=torch.bool)
    for chunk in range(chunks):
        kept = set(range(min(window.sink, chunk))) | set(
            range(max(0, chunk - window.capacity + window.sink + 1), chunk)
        )
        for row in (chunk, chunks + chunk):
            mask[row, sorted(kept)] = True
            mask[row, row] = True
    return mask


def flows(
    model: CausalDiT,
    clean: Tensor,
    noisy: Tensor,
    timesteps: Tensor,
    prompt_kv: tuple[Tensor, Tensor],
    view: TeacherForcingView,
) -> Tensor:
    """Flows of `noisy` [B, F, channels, h, w] at `timesteps` [B, F], with `clean` (of the same shape) as history."""
    frames = clean.shape[1]
    both: Tensor = model(
        torch.cat([clean, noisy], 1), torch.cat([torch.zeros_like(timesteps), timesteps], 1), prompt_kv, view
    )
    return both[:, frames:]
