# SPDX-License-Identifier: Apache-2.0
"""The eager baseline: the DiT with exactly the work that the reference code does. Backends are compared with it.

Built by `rows.py` from the weights of a `CausalDiT`; it reproduces the golden rollouts. By section of
docs/semantics.md: each layer and call clones, rolls and concatenates the keys and values of the whole window, with
counters read back from the device (3); all five calls of a chunk run every layer in full (3); a recache recomputes all
12 frames (6.1); RoPE is complex in float64 (2.2); the text MLP runs in every call (2). LoRA is assumed merged. PyTorch
chooses the attention kernel; the reference uses FlashAttention if installed. Not supported: relative RoPE, snapshots,
cleared caches.
"""

from __future__ import annotations

from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engines.baseline.kv_cache import LayerCache, Slot, Span, Update, plan_update
from longlive_serve.backends.base import PromptKV
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.dit.causal_dit import PATCH, Attention, Block, CausalDiT, gated, modulate, time_features
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCachePlan
from longlive_serve.models.dit.rope import MAX_FRAMES, axis_angles, split_pairs


class EagerDiT:
    """A causal DiT as in `backends/base.py`. `PromptKV` holds the text embeddings; other state is per slot."""

    def __init__(self, model: CausalDiT, config: ModelConfig, slots: int) -> None:
        weight = model.patch_embedding.weight
        self.model, self.config = model, config
        self.dtype = self.cache_dtype = weight.dtype
        self.sink = config.window.sink * config.tokens_per_frame
        self.rotary = ComplexRotary(config, weight.device)
        self.timesteps = FlowMatchScheduler(weight.device).timesteps
        self.clean_timestep = torch.zeros((), device=weight.device)
        self.slots = [
            Slot(layers=[LayerCache(config, weight) for _ in model.blocks], context_latents=self._no_chunks())
            for _ in range(slots)
        ]

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        return (embeds.to(self.dtype),)

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        state, (chunk,) = self.slots[slot], plan.chunks
        if chunk == step == 0:
            self._begin(state)
        return self._forward(noisy, self.timesteps[step], prompt_kv[0], state, self._span(noisy, chunk))

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        state, newest = self.slots[slot], max(plan.chunks)
        if newest < state.num_chunks:
            self._recache(state, prompt_kv[0], plan)
            return
        self._forward(clean, self.clean_timestep, prompt_kv[0], state, self._span(clean, newest))
        state.num_chunks = newest + 1
        state.context_latents.append(clean)

    def _recache(self, state: Slot, text: Tensor, plan: KVCachePlan) -> None:
        """Recompute all context chunks in time order. If the sink is kept, results that fall on it are discarded."""
        latents, keep_sink = torch.cat([*state.context_latents], dim=1), plan.first_block > 0
        if not keep_sink and state.num_chunks > len(state.context_latents):
            for layer in state.layers:
                layer.keys.zero_()
                layer.values.zero_()
        span = self._span(latents, state.num_chunks - len(state.context_latents), keep_sink)
        self._forward(latents, self.clean_timestep, text, state, span)
        state.text = None  # the next call recomputes the prompt's keys and values

    def _begin(self, state: Slot) -> None:
        for layer in state.layers:
            layer.global_end.zero_()
            layer.local_end.zero_()
        state.context_latents, state.text, state.num_chunks = self._no_chunks(), None, 0

    def _no_chunks(self) -> deque[Tensor]:
        return deque(maxlen=self.config.window.window // self.config.window.chunk)

    def _span(self, latents: Tensor, chunk: int, keep_sink: bool = False) -> Span:
        tokens = self.config.tokens_per_frame
        start = chunk * self.config.window.chunk * tokens
        return Span(start=start, end=start + latents.shape[1] * tokens, keep_sink=keep_sink)

    def _forward(self, latents: Tensor, timestep: Tensor, text: Tensor, state: Slot, span: Span) -> Tensor:
        """[1, F, channels, h, w] -> flow of the same shape."""
        model, frames = self.model, latents.shape[1]
        x = model.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2).contiguous()
        features = time_features(timestep.expand(1, frames), self.config.dit.freq_dim).to(self.dtype)
        time = model.time_embedding(features)
        modulation = model.time_projection(time).unflatten(-1, (6, -1))
        context = model.text_embedding(text)
        if state.text is not text:
            state.text = text
            for layer in state.layers:
                layer.prompt = None
        updates = []
        for block, layer in zip(model.blocks, state.layers, strict=True):
            x, update = self._block(block, x, modulation, context, layer, span)
            updates.append(update)
        for layer, update in zip(state.layers, updates, strict=True):
            update.apply(layer.keys, layer.values, self.sink)
            if not update.recompute:
                layer.global_end.fill_(update.global_end)
                layer.local_end.fill_(update.local_end)
        return model._unpatchify(model.head(x, time), latents.shape)

    def _block(
        self, block: Block, x: Tensor, modulation: Tensor, context: Tensor, layer: LayerCache, span: Span
    ) -> tuple[Tensor, Update]:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (block.modulation + modulation).unbind(2)
        attended, update = self._self_attention(block.self_attn, modulate(block.norm1(x), shift, scale), layer, span)
        x = x + gated(attended, gate)
        x = x + self._cross_attention(block.cross_attn, block.norm3(x), context, layer)
        return x + gated(block.ffn(modulate(block.norm2(x), ffn_shift, ffn_scale)), ffn_gate), update

    def _self_attention(self, attn: Attention, x: Tensor, layer: LayerCache, span: Span) -> tuple[Tensor, Update]:
        q = self.rotary(_heads(attn.norm_q(attn.q(x)), attn), span)
        k = self.rotary(_heads(attn.norm_k(attn.k(x)), attn), span)
        update = plan_update(layer, span, k, _heads(attn.v(x), attn), self.sink)
        keys, values = layer.keys.clone(), layer.values.clone()
        update.apply(keys, values, self.sink)
        end, sink = update.local_end, self.sink
        if sink:
            start = max(sink, end - (keys.shape[1] - sink))
            keys = torch.cat([keys[:, :sink], keys[:, start:end]], dim=1)
            values = torch.cat([values[:, :sink], values[:, start:end]], dim=1)
        else:
            keys, values = keys[:, :end], values[:, :end]
        return _attend(attn, q, keys, values), update

    def _cross_attention(self, attn: Attention, x: Tensor, context: Tensor, layer: LayerCache) -> Tensor:
        q = _heads(attn.norm_q(attn.q(x)), attn)
        if layer.prompt is None:
            layer.prompt = _heads(attn.norm_k(attn.k(context)), attn), _heads(attn.v(context), attn)
        return _attend(attn, q, *layer.prompt)


class ComplexRotary:
    """RoPE in complex float64. Like the reference, it assembles the factors in every call."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.grid = config.latent_height // PATCH, config.latent_width // PATCH
        angles = [axis_angles(MAX_FRAMES, pairs).to(device) for pairs in split_pairs(config.dit.head_dim)]
        self.factors = [torch.polar(torch.ones_like(angle), angle) for angle in angles]

    def __call__(self, x: Tensor, span: Span) -> Tensor:
        """Rotate x [1, L, H, d] by its position in the video."""
        (rows, columns), tokens = self.grid, x.shape[1]
        first, frames = span.start // (rows * columns), tokens // (rows * columns)
        time, row, column = self.factors
        size = (frames, rows, columns, -1)
        parts = [
            time[first : first + frames].view(frames, 1, 1, -1).expand(size),
            row[:rows].view(1, rows, 1, -1).expand(size),
            column[:columns].view(1, 1, columns, -1).expand(size),
        ]
        factors = torch.cat(parts, dim=-1).reshape(tokens, 1, -1)
        pairs = torch.view_as_complex(x[0].to(torch.float64).unflatten(-1, (-1, 2)))
        rotated = torch.view_as_real(pairs * factors).flatten(2)
        rotated = torch.cat([rotated, x[0, tokens:]])  # the reference appends padding; here it is empty
        return torch.stack([rotated]).type_as(x)  # as the reference stacks the samples of a batch


def _heads(x: Tensor, attn: Attention) -> Tensor:
    heads: Tensor = x.unflatten(-1, (attn.num_heads, -1))
    return heads  # [1, L, H, d]


def _attend(attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    projected: Tensor = attn.o(out.transpose(1, 2).flatten(2))
    return projected
