# SPDX-License-Identifier: Apache-2.0
"""The eager baseline's KV cache, as in the reference (docs/semantics.md, section 3): rows stay in time order and are
rolled, and the counters are tensors on the device.

Used by `dit.py`. The server uses a ring buffer instead (`longlive_serve/models/dit/kv_cache.py`).
"""

from __future__ import annotations

import dataclasses
from collections import deque

import torch
from torch import Tensor

from longlive_serve.config.presets import ModelConfig


class LayerCache:
    """Keys (rotated) and values of one layer and session, [1, window tokens, H, d], in time order."""

    def __init__(self, config: ModelConfig, like: Tensor) -> None:
        dit = config.dit
        shape = (1, config.window.window * config.tokens_per_frame, dit.num_heads, dit.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)
        self.global_end = torch.zeros(1, dtype=torch.long, device=like.device)
        self.local_end = torch.zeros(1, dtype=torch.long, device=like.device)
        self.prompt: tuple[Tensor, Tensor] | None = None
        """Cross-attention keys and values; None until the prompt's first call."""


@dataclasses.dataclass(kw_only=True)
class Slot:
    """The state of one session."""

    layers: list[LayerCache]
    context_latents: deque[Tensor]
    """Clean latents of the window's chunks."""
    text: Tensor | None = None
    """The embeddings whose keys and values the layers hold."""
    num_chunks: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The tokens of one call, as positions in the video."""

    start: int
    end: int
    keep_sink: bool = False
    """A recache leaves the sink's rows unchanged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Update:
    """One call's update of a layer's cache, in tokens: applied to a clone first, to the cache after the last layer."""

    num_evicted: int
    """The rows after the sink move forward by this many; 0: the new rows fit."""
    num_rolled: int
    start: int
    local_end: int
    global_end: int
    recompute: bool
    """The counters do not change."""
    new: tuple[Tensor, Tensor]

    def apply(self, keys: Tensor, values: Tensor, sink: int) -> None:
        for cache, new in ((keys, self.new[0]), (values, self.new[1])):
            if self.num_evicted:
                kept = cache[:, sink + self.num_evicted : sink + self.num_evicted + self.num_rolled].clone()
                cache[:, sink : sink + self.num_rolled] = kept
            cache[:, self.start : self.local_end] = new[:, new.shape[1] - (self.local_end - self.start) :]


def plan_update(layer: LayerCache, span: Span, keys: Tensor, values: Tensor, sink: int) -> Update:
    """Roll the cache if the new tokens do not fit. Each `item` synchronizes with the device, as in the reference."""
    new, capacity = span.end - span.start, layer.keys.shape[1]
    recompute = span.end <= layer.global_end.item() and span.start > 0
    num_evicted = num_rolled = 0
    if span.end > layer.global_end.item() and new + layer.local_end.item() > capacity:
        num_evicted = new + int(layer.local_end.item()) - capacity
        num_rolled = int(layer.local_end.item()) - num_evicted - sink
    local_end = int(layer.local_end.item()) + span.end - int(layer.global_end.item()) - num_evicted
    start = local_end - new
    if recompute and span.keep_sink:
        start = max(start, sink)
    return Update(
        num_evicted=num_evicted,
        num_rolled=num_rolled,
        start=start,
        local_end=local_end,
        global_end=span.end,
        recompute=recompute,
        new=(keys, values),
    )
