# SPDX-License-Identifier: Apache-2.0
"""What the model runner needs of a backend, whichever backend runs it.

Implemented by the modules beside it; called by the model runner, which never asks which implementation it has. A
backend belongs to one thread. B is 1 everywhere: sessions take turns at chunk boundaries.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.dit.kv_cache import KVCachePlan

PromptKV = tuple[Tensor, ...]
"""Cross-attention keys and values of every layer, each [layers, 1, heads, rows, head_dim], and what else a backend's
own calls want of a prompt. A step never changes them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the DiT takes it."""

    embeds: Tensor
    """[1, text_len, text_dim], rows after the prompt are zero."""
    tokens: int
    """Tokens used, the end mark included."""
    tokens_given: int
    """Tokens before truncation to text_len."""
    unknown: tuple[str, ...] = ()
    """Words that the text encoder has no token for."""
    known: tuple[str, ...] = ()
    """All the words that it knows, where they are few."""


class TextEncoderBackend(Protocol):
    """Prompt -> embeddings: cleaning, tokenizer and umT5."""

    def encode(self, prompt: str) -> EncodedPrompt: ...


class DiTBackend(Protocol):
    """The causal DiT with the KV cache of every slot."""

    dtype: torch.dtype
    """Of its latents."""
    cache_dtype: torch.dtype
    """Of the keys and values of its slots."""

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        """[1, text_len, text_dim], zero behind `tokens` -> keys and values that every later call under this prompt
        takes."""
        ...

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        """The flow of one chunk [1, frames, channels, h, w] at denoising step `step`.

        Overwrites the chunk's own block in the slot's cache, which is not clean until `update_kv_cache`.
        """
        ...

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        """Write the clean keys and values of `clean` [1, frames, channels, h, w] to the slot's cache.

        With one chunk this is a chunk's KV-cache update, with the chunks of `Window.recache` it is a recache.
        """
        ...


@runtime_checkable
class Preparable(Protocol):
    """A backend that can do at the start what it would else do when a slot is used for the first time."""

    def prepare(self, slots: int | None = None) -> None:
        """For the first so many slots (default: all), what calls before the first `prepare` have done for theirs."""
        ...


@runtime_checkable
class Exchangeable(DiTBackend, Protocol):
    """A DiT whose weights can be others for sessions to come."""

    def with_model(self, model: CausalDiT) -> Exchangeable:
        """The same backend, on the same cache, with other weights; this one goes on beside it."""
        ...


class VAEDecoderBackend(Protocol):
    """Latents of any dtype -> video frames, one stream at a time; the stream's state is the caller's."""

    def initial_cache(self) -> list[Tensor]:
        """The feature cache of a stream that has not begun."""
        ...

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        """[1, frames, channels, h, w] -> uint8 [video frames, height, width, 3] on the device, and the new cache.

        `is_first` marks the first call of a stream: its first latent frame gives 1 video frame instead of 4.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backends:
    """The three models of one LongLive, ready to run, and what they were built as."""

    text_encoder: TextEncoderBackend
    dit: DiTBackend
    vae_decoder: VAEDecoderBackend
    name: str
    """The backend."""
    device: str
    dtype: str
