# SPDX-License-Identifier: Apache-2.0
"""One video being generated, with all its state; and where its noise comes from.

Made by the session manager (or by replay), advanced by the model runner. It knows nothing of requests and clients.
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

MAX_PENDING = 64  # prompts to come of one session, and its open requests for chunks
NOW = -1  # `Prompt.at_latent_frame` of a prompt that is meant for the next chunk


class Noise(Protocol):
    """Standard normal noise in the order in which a session uses it: per chunk the initial noise, then one draw
    after each denoising step but the last."""

    def draw(self, shape: tuple[int, ...], num_samples: int) -> Tensor:
        """A chunk's, [draws, *shape]."""
        ...

    def prepare(self, shape: tuple[int, ...], num_samples: int, pinned: bool) -> None:
        """Told while the device works what the next chunk will draw; `pinned`: in memory that a GPU copies from."""
        ...


class SeededNoise:
    """Noise from the session's own generator: the same seed gives the same video, whatever runs beside it.

    Drawn in float32 on the CPU, so that it is also the same on every device.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator("cpu").manual_seed(seed)
        self._prepared: Tensor | None = None
        self._state_before = self._generator.get_state()

    @property
    def state(self) -> Tensor:
        """Enough to draw the same from here on: the generator's state, uint8 [bytes]. To be asked between chunks."""
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
        for one in noise:
            torch.randn(shape, generator=self._generator, out=one)
        return noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt of a session. `index` counts them in the order in which they were accepted."""

    index: int
    text: str
    at_latent_frame: int = NOW
    """It waits for the first chunk that starts at or after this latent frame."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SinkChunk:
    """A chunk of the sink: enough to write its keys and values again."""

    chunk: int
    latents: Tensor
    """Clean, [1, frames, channels, h, w]."""
    prompt: Prompt
    """Under which they were written last."""


@dataclasses.dataclass(kw_only=True)
class Session:
    """The state of one video. The model runner alone changes it after the start, but for `add_prompt`."""

    id: str
    prompt: Prompt
    """In force (from the first chunk on)."""
    noise: Noise
    client: str = ""
    """Who began it, if that is known."""
    token: str = ""
    """What later requests have to repeat; empty: nothing."""
    slot: int = -1
    """Its share of the KV cache; -1 while it waits for one."""
    global_sink: bool = True
    """A recache keeps the sink of the first prompt: the reference's default."""
    on_switch: str = RECACHE
    """What a prompt switch does to the cache: one of `options.ON_SWITCH`."""
    first_cached: int = 0
    """The first chunk that the cache knows of: more than 0 after a switch that cleared it."""
    next_chunk: int = 0
    """Its number."""
    pending: list[Prompt] = dataclasses.field(default_factory=list)
    """Prompts to come, ordered by their time; at most one takes effect per chunk boundary."""
    prompts: int = 1
    """Prompts accepted so far."""
    prompt_kv: PromptKV | None = None
    sink: list[SinkChunk] = dataclasses.field(default_factory=list)
    """What lies in the sink's places."""
    context_latents: deque[Tensor] = dataclasses.field(default_factory=deque)
    """Clean latents of the last chunks, as many as the window holds: what a recache needs."""
    decoder_cache: list[Tensor] | None = None
    phases: Phases | None = None
    """Of its next chunk: so far the KV-cache update of the last one, which nobody has waited for."""
    dit: DiTBackend | None = None
    """The one that it began with, where that may be exchanged for later sessions; None: the model runner's."""

    def add_prompt(self, text: str, at_latent_frame: int = NOW) -> Prompt:
        """Accept a prompt to come. A prompt for NOW replaces one for NOW that has not taken effect yet."""
        prompt = Prompt(index=self.prompts, text=text, at_latent_frame=at_latent_frame)
        self.prompts += 1
        if at_latent_frame == NOW:
            self.pending = [other for other in self.pending if other.at_latent_frame != NOW]
        bisect.insort(self.pending, prompt, key=lambda other: other.at_latent_frame)
        return prompt
