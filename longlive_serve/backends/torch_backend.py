# SPDX-License-Identifier: Apache-2.0
"""The three models run by PyTorch, on the CPU or on CUDA.

Built by `build_backends`. The reference backend: the others are tested against it.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from longlive_serve.backends.base import EncodedPrompt, PromptKV
from longlive_serve.backends.device import to_device
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.dit.causal_dit import PATCH, CacheView, CausalDiT
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCache, KVCachePlan
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.text_encoder import TextEncoder, Tokenizer
from longlive_serve.models.vae.decoder import VAEDecoder, to_uint8
from longlive_serve.models.vae.tiny_decoder import TinyDecoder


class TorchTextEncoder:
    """umT5 and its tokenizer."""

    def __init__(self, model: TextEncoder, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.known_words = tokenizer.known_words()

    def encode(self, prompt: str) -> EncodedPrompt:
        tokens = self.tokenizer(prompt)
        device = next(self.model.parameters()).device
        embeds = self.model(to_device(tokens.ids, device), to_device(tokens.mask, device))
        return EncodedPrompt(
            embeds=embeds,
            tokens=tokens.length,
            tokens_given=tokens.full_length,
            unknown=tokens.unknown,
            known=self.known_words,
        )


class TorchDiT:
    """The causal DiT and the KV cache of all slots."""

    def __init__(self, model: CausalDiT, config: ModelConfig, slots: int, variant: str) -> None:
        weight = model.patch_embedding.weight
        self.model = model
        self.dtype = self.cache_dtype = weight.dtype
        self.relative = variant == "infinity"
        self.cache = KVCache(config, slots, weight.device, weight.dtype)
        self.tables = RotaryTables(
            config.dit.head_dim,
            config.latent_height // PATCH,
            config.latent_width // PATCH,
            config.window.chunk,
            weight.device,
        )
        self.timesteps = FlowMatchScheduler(weight.device).timesteps
        self.clean_timestep = torch.zeros((), device=weight.device)

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        return self.model.embed_prompt(embeds.to(self.dtype))

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        timesteps = self.timesteps[step].expand(noisy.shape[:2])
        flow: Tensor = self.model(noisy, timesteps, prompt_kv, self._view(slot, plan))
        return flow

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        timesteps = self.clean_timestep.expand(clean.shape[:2])
        self.model(clean, timesteps, prompt_kv, self._view(slot, plan), update_kv_cache=True)

    def with_model(self, model: CausalDiT) -> TorchDiT:
        """As `Exchangeable.with_model`."""
        other = copy.copy(self)
        other.model = model
        return other

    def _view(self, slot: int, plan: KVCachePlan) -> CacheView:
        return CacheView(*self.cache.slot(slot), self.tables, plan, self.relative)


class TorchVAEDecoder:
    """The streaming Wan VAE decoder or tiny decoder."""

    def __init__(self, model: VAEDecoder | TinyDecoder, config: ModelConfig) -> None:
        self.model, self.config = model, config

    def initial_cache(self) -> list[Tensor]:
        weight = next(self.model.parameters())
        size = (self.config.latent_height, self.config.latent_width)
        return self.model.initial_cache(1, *size, weight.device, weight.dtype)

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        frames, cache = self.model(latents.to(next(self.model.parameters()).dtype), cache, is_first)
        return to_uint8(frames)[0], cache
