# SPDX-License-Identifier: Apache-2.0
"""The KV cache: which chunk of the video is in which rows (`Window`, integers only) and the tensors (`KVCache`).

Called by the model runner and the backends.

A slot's cache of `window` latent frames is divided into *blocks* of one chunk each. The first blocks hold the sink; the
others are a ring buffer, in which a new chunk overwrites the oldest one. Nothing is moved, and the rows in use are
always `[0, rows)`. Attention does not depend on the order of keys; only relative RoPE needs their order in time, which
`KVCachePlan.key_positions` gives.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longlive_serve.config.presets import ModelConfig, WindowConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCachePlan:
    """Where one forward of whole chunks reads and writes the cache. Every number counts chunks.

    The forward's chunks are in the order of their blocks, not of time: `first_block` and the following ones.
    """

    chunks: tuple[int, ...]
    """Number, from the start of the video, of every chunk in the forward."""
    first_block: int
    """The block that `chunks[0]` is written to; the others follow it without a gap."""
    num_blocks: int
    """The forward attends to blocks [0, num_blocks): all in use, including its own."""
    query_positions: tuple[int, ...]
    """For relative RoPE: position in time (0 = oldest cached) of every chunk in the forward."""
    key_positions: tuple[int, ...]
    """For relative RoPE: position in time of every block in [0, num_blocks)."""


class Window:
    """The arithmetic of window and sink. Source: docs/semantics.md, sections 3 and 6.1."""

    def __init__(self, config: WindowConfig) -> None:
        self.capacity = config.window // config.chunk
        self.sink = config.sink // config.chunk

    def block_of(self, chunk: int) -> int:
        """The block of a chunk: its own number until the window is full, then a block of the ring after the sink."""
        if chunk < self.capacity:
            return chunk
        return self.sink + (chunk - self.sink) % (self.capacity - self.sink)

    def step(self, chunk: int, first_cached: int = 0) -> KVCachePlan:
        """Plan of the denoising steps and the KV-cache update of chunk number `chunk`.

        `first_cached` is the number of the first chunk since the cache was cleared, 0 if it never was.
        """
        num_cached = chunk - first_cached
        key_positions = self._positions_in_time(num_cached)
        block = self.block_of(num_cached)
        return KVCachePlan(
            chunks=(chunk,),
            first_block=block,
            num_blocks=min(num_cached + 1, self.capacity),
            query_positions=(key_positions[block],),
            key_positions=key_positions,
        )

    def recache(self, done: int, keep_sink: bool, first_cached: int = 0) -> KVCachePlan:
        """Plan of the recache before chunk number `done`: recompute every cached chunk under the new prompt.

        With `keep_sink` the sink is unchanged, unless no chunk has left the window yet: then the reference
        recomputes the sink too. Without it, the sink's blocks take the oldest chunks of the last `window` frames.
        `first_cached`: as in `step`.
        """
        assert done > first_cached, "nothing to recache before the first chunk"
        num_cached = done - first_cached
        num_blocks = min(num_cached, self.capacity)
        first_block = self.sink if keep_sink and num_cached > self.capacity else 0
        chunks = [0] * num_blocks
        for chunk in range(num_cached - num_blocks, num_cached):
            chunks[self.block_of(chunk)] = first_cached + chunk
        if num_cached > self.capacity:
            for block in range(self.sink):
                chunks[block] = done - self.capacity + block
        key_positions = self._positions_in_time(num_cached - 1)
        return KVCachePlan(
            chunks=tuple(chunks[first_block:]),
            first_block=first_block,
            num_blocks=num_blocks,
            query_positions=key_positions[first_block:],
            key_positions=key_positions,
        )

    def call_sizes(self) -> list[tuple[int, int]]:
        """(chunks in the forward, chunks attended to) of every possible step, KV-cache update and recache.

        While the window fills, a call attends only to the chunks cached so far, without a mask.
        """
        full = 2 * self.capacity
        plans = [self.step(chunk) for chunk in range(full)]
        plans += [self.recache(done, keep_sink) for done in range(1, full) for keep_sink in (True, False)]
        return sorted({(len(plan.chunks), plan.num_blocks) for plan in plans})

    def _positions_in_time(self, newest: int) -> tuple[int, ...]:
        """For every block in use after chunk `newest` was written: how many cached chunks are older than its own."""
        if newest < self.capacity:
            return tuple(range(newest + 1))
        ring = {self.block_of(newest - age): self.capacity - 1 - age for age in range(self.capacity - self.sink)}
        return tuple(range(self.sink)) + tuple(ring[block] for block in range(self.sink, self.capacity))


class KVCache:
    """Keys and values of every slot, allocated once: [layers, slots, heads, window tokens, head_dim] each.

    Only clean keys and values persist: the noisy ones of the chunk in progress are in that chunk's own block, and its
    KV-cache update overwrites them. A slot needs no clearing between sessions: only blocks in use are read.
    """

    def __init__(
        self, config: ModelConfig, slots: int, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> None:
        dit = config.dit
        tokens = config.window.window * config.tokens_per_frame
        shape = (dit.num_layers, slots, dit.num_heads, tokens, dit.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)

    def slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views of one slot's keys and values, [layers, 1, heads, window tokens, head_dim]."""
        return self.keys[:, slot : slot + 1], self.values[:, slot : slot + 1]

    @staticmethod
    def bytes_of(config: ModelConfig, slots: int, dtype: torch.dtype) -> int:
        """Size of the cache in bytes."""
        tokens = config.window.window * config.tokens_per_frame
        return 2 * config.dit.num_layers * slots * config.dit.dim * tokens * dtype.itemsize
