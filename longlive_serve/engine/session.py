# SPDX-License-Identifier: Apache-2.0
"""The state of one video during generation, and its source of noise.

Created by the session manager (or by replay), advanced by the model runner. It does not know requests and clients.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from typing import Protocol

import torch
from torch import Tensor

from longlive_serve.backends.base import DiTBackend, PromptKV
from longlive_serve.engine.inflight import Phases
from longlive_serve.protocol.session_options import RECACHE

MAX_PENDING = 64  # of one session: pending prompts, and open requests for chunks
NOW = -1  # `Prompt.at_latent_frame` of a prompt for the next chunk


class Noise(Protocol):
    """Standard normal noise of a session: for each chunk the initial noise, then one sample after each denoising step
    except the last."""

    def draw(self, shape: tuple[int, ...], num_samples: int) -> Tensor:
        """The noise of the next chunk, [num_samples, *shape]."""
        ...

    def prepare(self, shape: tuple[int, ...], num_samples: int, pinned: bool) -> None:
        """Generate the next chunk's noise ahead, while the device is busy; `pinned`: in page-locked memory."""
        ...


class SeededNoise:
    """Noise from the session's own generator: a seed gives the same video, independent of other sessions.

    Generated in float32 on the CPU, so that it is the same on every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._prepared: Tensor | None = None
        self._state_before = self._generator.get_state()

    @property
    def state(self) -> Tensor:
        """The generator's state before the next chunk, uint8 [bytes]. Read it between chunks only."""
        return self._generator.get_state() if self._prepared is None else self._state_before

    @state.setter
    def state(self, state: Tensor) -> None:
        self._generator.set_state(state)
        self._prepared = None

    def draw(self, shape: tuple[int, ...], num_samples: int) -> Tensor:
        if self._prepared is None:
            return self._draw(shape, num_samples, False)
        noise, self._prepared = self._prepared, None
        return noise

    def prepare(self, shape: tuple[int, ...], num_samples: int, pinned: bool) -> None:
        if self._prepared is None:
            self._state_before = self._generator.get_state()
            self._prepared = self._draw(shape, num_samples, pinned)

    def _draw(self, shape: tuple[int, ...], num_samples: int, pinned: bool) -> Tensor:
        noise = torch.empty((num_samples, *shape), pin_memory=pinned)
        for sample in noise:
            torch.randn(shape, generator=self._generator, out=sample)
        return noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a session. `index` counts from 0 in the order of acceptance."""

    index: int
    text: str
    at_latent_frame: int = NOW
    """It takes effect with the first chunk that starts at or after this latent frame."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SinkChunk:
    """A chunk in the sink: what is needed to recompute its keys and values."""

    chunk: int
    latents: Tensor
    """Clean, [1, frames, channels, h, w]."""
    prompt: Prompt
    """The prompt of the last KV-cache update."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """The state of one video. After the start only the model runner changes it, except for `add_prompt`."""

    id: str
    prompt: Prompt
    """The prompt in force."""
    noise: Noise
    client: str = ""
    """The client that started it; empty: unknown."""
    token: str = ""
    """The session token, which later requests must repeat; empty: none."""
    slot: int = -1
    """Its slot in the KV cache; -1 while it waits for one."""
    global_sink: bool = True
    """A recache keeps the sink of the first prompt (the reference's default)."""
    on_switch: str = RECACHE
    """What a prompt switch does to the KV cache: one of `session_options.ON_SWITCH`."""
    first_cached: int = 0
    """The first chunk since a prompt switch last cleared the KV cache; 0: none did."""
    next_chunk: int = 0
    """Number of the next chunk, from 0."""
    pending: list[Prompt] = dataclasses.field(default_factory=list)
    """Prompts not in force yet, ordered by latent frame; at most one takes effect per chunk boundary."""
    prompts: int = 1
    """Prompts accepted so far."""
    prompt_kv: PromptKV | None = None
    sink: list[SinkChunk] = dataclasses.field(default_factory=list)
    """The chunks in the sink's blocks."""
    context_latents: deque[Tensor] = dataclasses.field(default_factory=deque)
    """Clean latents of the last chunks, up to a full window: the input of a recache."""
    decoder_cache: list[Tensor] | None = None
    phases: Phases | None = None
    """Timings of the next chunk; they begin with the KV-cache update of the previous one."""
    dit: DiTBackend | None = None
    """The DiT that it started with, because `set_lora` replaces it for new sessions; None: the model runner's."""

    def add_prompt(self, text: str, at_latent_frame: int = NOW) -> Prompt:
        """Add a pending prompt. A prompt for NOW replaces a pending one for NOW."""
        prompt = Prompt(index=self.prompts, text=text, at_latent_frame=at_latent_frame)
        self.prompts += 1
        if at_latent_frame == NOW:
            self.pending = [other for other in self.pending if other.at_latent_frame != NOW]
        bisect.insort(self.pending, prompt, key=lambda other: other.at_latent_frame)
        return prompt
