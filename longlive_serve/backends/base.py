# SPDX-License-Identifier: Apache-2.0
"""The backend interface that the model runner calls.

Implemented by the other modules of this package. A backend belongs to one thread. B is 1 everywhere: sessions take
turns at chunk boundaries.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.dit.kv_cache import KVCachePlan

PromptKV = tuple[Tensor, ...]
"""Cross-attention keys and values of every layer, each [layers, 1, heads, rows, head_dim], and further tensors that the
same backend's calls need. Steps do not modify them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the input of the DiT."""

    embeds: Tensor
    """[1, text_len, text_dim], rows after the prompt are zero."""
    tokens: int
    """Tokens used, including </s>."""
    tokens_given: int
    """Tokens before truncation to text_len."""
    unknown: tuple[str, ...] = ()
    """Words without a token in the text encoder's vocabulary."""
    known: tuple[str, ...] = ()
    """All words of a small vocabulary; empty for a large one."""


class TextEncoderBackend(Protocol):
    """Prompt -> embeddings: cleaning, tokenizer and umT5."""

    def encode(self, prompt: str) -> EncodedPrompt: ...


class DiTBackend(Protocol):
    """The causal DiT with the KV cache of every slot."""

    dtype: torch.dtype
    """Dtype of the latents."""
    cache_dtype: torch.dtype
    """Dtype of the cached keys and values."""

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        """[1, text_len, text_dim], zero after `tokens` rows -> keys and values for all calls with this prompt."""
        ...

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        """The flow of one chunk [1, frames, channels, h, w] at denoising step `step`.

        Overwrites the chunk's own block in the slot's cache with noisy values, until `update_kv_cache`.
        """
        ...

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        """Write the clean keys and values of `clean` [1, frames, channels, h, w] to the slot's cache.

        With one chunk this is the chunk's KV-cache update, with the chunks of `Window.recache` a recache.
        """
        ...


@runtime_checkable
class Preparable(Protocol):
    """A backend that can do the first-use work of each slot at start-up."""

    def prepare(self, slots: int | None = None) -> None:
        """Prepare the first `slots` slots (default: all) for every kind of call made before the first `prepare`."""
        ...


@runtime_checkable
class Exchangeable(DiTBackend, Protocol):
    """A DiT backend whose weights can be replaced for new sessions."""

    def with_model(self, model: CausalDiT) -> Exchangeable:
        """The same backend with the weights of `model`, on the same cache; this one remains usable."""
        ...


class VAEDecoderBackend(Protocol):
    """Latents of any dtype -> video frames, one stream at a time; the caller owns the stream's state."""

    def initial_cache(self) -> list[Tensor]:
        """The feature cache at the start of a stream."""
        ...

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        """[1, frames, channels, h, w] -> uint8 [video frames, height, width, 3] on the device, and the new cache.

        `is_first` marks the first call of a stream: its first latent frame yields 1 video frame instead of 4.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backends:
    """The three models of one LongLive, ready to run, with their backend, device and dtype."""

    text_encoder: TextEncoderBackend
    dit: DiTBackend
    vae_decoder: VAEDecoderBackend
    name: str
    """Names of the backends, joined by "+"."""
    device: str
    dtype: str
