# SPDX-License-Identifier: Apache-2.0
"""The causal DiT of LongLive 1.0: Wan2.1-T2V with a KV cache, in plain PyTorch.

Called by the torch backend and by the export. All state comes in as arguments; the cache tensors are written in
place. Module names are those of the Wan checkpoint. Shapes: B batch, F latent frames, n tokens per frame, L = F*n,
D width, H heads, d head width. Source: docs/semantics.md, sections 2 and 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.config.presets import DiTConfig
from longlive_serve.models.dit.kv_cache import KVCachePlan
from longlive_serve.models.dit.rope import RotaryTables, rotate

PATCH = 2  # height and width of a patch; one latent frame is one patch deep
Angles = tuple[Tensor, Tensor]  # cosines and sines


class RMSNorm(nn.Module):
    """RMS norm over the full width: statistics in float32, cast back, then the weight."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class Attention(nn.Module):
    """The projections and norms that self- and cross-attention share; heads are split after the norm."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def queries(self, x: Tensor) -> Tensor:
        return self._split(self.norm_q(self.q(x)))

    def keys(self, x: Tensor) -> Tensor:
        return self._split(self.norm_k(self.k(x)))

    def values(self, x: Tensor) -> Tensor:
        return self._split(self.v(x))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """softmax(q k^T / sqrt(d)) v, then the output projection. [B, H, L, d] -> [B, L, D].

        Attends to all keys unless `mask` [L, keys] is given. Only training uses one, to run many chunks at once.
        """
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return projected

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1))
        return heads.transpose(1, 2)  # [B, L, D] -> [B, H, L, d]


class Cache(Protocol):
    """The KV cache interface that the blocks use in one forward."""

    mask: Tensor | None
    query_angles: Angles

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys (before RoPE) and values; return all keys (after RoPE) and values to attend to."""
        ...


class CacheView:
    """View of the cache for one forward: writes a layer's new keys and values in place and returns all in use."""

    mask: Tensor | None = None

    def __init__(self, keys: Tensor, values: Tensor, tables: RotaryTables, plan: KVCachePlan, relative: bool):
        rows = tables.tokens_per_chunk
        self.keys, self.values = keys, values  # [layers, B, H, window tokens, d]
        self.first = plan.first_block * rows
        self.end = self.first + len(plan.chunks) * rows
        self.used = plan.num_blocks * rows
        self.relative = relative
        order = plan.query_positions if relative else plan.chunks
        self.query_angles = tables.of_chunks(order)
        self.key_angles = tables.of_chunks(plan.key_positions) if relative else self.query_angles

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `Cache.update`.

        The base variant stores rotated keys; the infinity variant stores plain ones and rotates all of them by
        their position in time on every call.
        """
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.first : self.end] = k if self.relative else rotate(k, *self.key_angles)
        values[:, :, self.first : self.end] = v
        in_use = keys[:, :, : self.used]
        return rotate(in_use, *self.key_angles) if self.relative else in_use, values[:, :, : self.used]


class Block(nn.Module):
    """Modulated self-attention on the cache, cross-attention to the prompt, modulated FFN."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self, x: Tensor, modulation: Tensor, prompt_k: Tensor, prompt_v: Tensor, cache: Cache, layer: int
    ) -> Tensor:
        """x [B, L, D], modulation [B, F, 6, D], prompt_k and prompt_v [B, H, text_len, d] -> [B, L, D]."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation + modulation).unbind(2)
        z = modulate(self.norm1(x), shift, scale)
        k, v = cache.update(layer, self.self_attn.keys(z), self.self_attn.values(z))
        q = rotate(self.self_attn.queries(z), *cache.query_angles)
        x = x + gated(self.self_attn.attend(q, k, v, cache.mask), gate)
        x = x + self.cross_attn.attend(self.cross_attn.queries(self.norm3(x)), prompt_k, prompt_v)
        return x + gated(self.ffn(modulate(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)

    def write_kv(self, x: Tensor, modulation: Tensor, cache: Cache, layer: int) -> None:
        """The part of `forward` that updates the KV cache."""
        shift, scale = (self.modulation + modulation).unbind(2)[:2]
        z = modulate(self.norm1(x), shift, scale)
        cache.update(layer, self.self_attn.keys(z), self.self_attn.values(z))


class Head(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, PATCH * PATCH * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, L, D], time [B, F, D] -> patches [B, L, 4 * channels]."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        out: Tensor = self.head(modulate(self.norm(x), shift, scale))
        return out


class CausalDiT(nn.Module):
    """Predicts the flow (noise - clean latents) of some chunks, given the cache of earlier ones."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, (1, PATCH, PATCH), (1, PATCH, PATCH))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim), nn.GELU("tanh"), nn.Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks: Sequence[Block] = nn.ModuleList(Block(config) for _ in range(config.num_layers))  # type: ignore[assignment]
        self.head = Head(config)

    def embed_prompt(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Text encoder output [B, text_len, text_dim] -> cross-attention keys and values of every layer.

        Both [layers, B, H, text_len, d]. They depend only on the prompt: computed once per prompt, read by every step.
        """
        context = self.text_embedding(text)
        keys = [block.cross_attn.keys(context) for block in self.blocks]
        values = [block.cross_attn.values(context) for block in self.blocks]
        return torch.stack(keys), torch.stack(values)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        prompt_kv: tuple[Tensor, Tensor],
        cache: Cache,
        update_kv_cache: bool = False,
    ) -> Tensor | None:
        """One forward of whole chunks, in the order of their blocks.

        latents [B, F, channels, h, w]; timesteps [B, F] float32; prompt_kv as `embed_prompt` returns it. The keys
        and values of the new frames are written to the cache. Returns the flow, shaped like latents. With
        `update_kv_cache` it returns None: the last layer stops after its keys and values.
        """
        features = time_features(timesteps, self.config.freq_dim).to(latents.dtype)
        return self.run(latents, features, prompt_kv, cache, update_kv_cache)

    def run(
        self,
        latents: Tensor,
        features: Tensor,
        prompt_kv: tuple[Tensor, Tensor],
        cache: Cache,
        update_kv_cache: bool = False,
    ) -> Tensor | None:
        """`forward` with sinusoids [B, F, freq_dim] instead of timesteps: they need float64, which TensorRT lacks."""
        x = self._patchify(latents)
        time = self.time_embedding(features)  # [B, F, D]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B, F, 6, D]
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            if update_kv_cache and layer == last:
                block.write_kv(x, modulation, cache, layer)
                return None
            x = block(x, modulation, prompt_kv[0][layer], prompt_kv[1][layer], cache, layer)
        return self._unpatchify(self.head(x, time), latents.shape)

    def _patchify(self, latents: Tensor) -> Tensor:
        """[B, F, C, h, w] -> [B, F * h/2 * w/2, D]. The Conv3d's stride equals its kernel size: one matmul."""
        weight = self.patch_embedding.weight.flatten(1)
        patches = latents.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))  # [B, F, C, rows, 2, cols, 2]
        patches = patches.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(1, 3)
        return F.linear(patches, weight, self.patch_embedding.bias)

    def _unpatchify(self, patches: Tensor, shape: torch.Size) -> Tensor:
        """[B, L, (ph, pw, c)] -> [B, F, C, h, w]."""
        batch, frames, channels, height, width = shape
        x = patches.reshape(batch, frames, height // PATCH, width // PATCH, PATCH, PATCH, channels)
        return x.permute(0, 1, 6, 2, 4, 3, 5).reshape(shape)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, L, D] with one shift and scale [B, F, D] per frame."""
    per_frame: Tensor = x.unflatten(1, (shift.shape[1], -1))
    return (per_frame * (1 + scale).unsqueeze(2) + shift.unsqueeze(2)).flatten(1, 2)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x [B, L, D] times one gate [B, F, D] per frame."""
    per_frame: Tensor = x.unflatten(1, (gate.shape[1], -1))
    return (per_frame * gate.unsqueeze(2)).flatten(1, 2)


def time_features(timesteps: Tensor, size: int) -> Tensor:
    """Sinusoids of the timesteps, [..] -> [.., size], cosines first, in float64."""
    half = size // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timesteps.device) / -half
    angles = timesteps.double().unsqueeze(-1) * torch.pow(10000.0, exponent)
    return torch.cat([angles.cos(), angles.sin()], -1)
