# SPDX-License-Identifier: Apache-2.0
"""Measures one row with one session at a time: chunks and their phases, first frames, prompt switches, memory.

Called by the run, with the server's model runner. `live.py` measures concurrent sessions.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines.prompts import PROMPTS
from benchmarks.timing import WARM_UP, seconds_of, spread
from longlive_serve.config.presets import FRAMES_PER_LATENT
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.models.dit.kv_cache import KVCache

DENOISE, KV_CACHE_UPDATE, DECODE, SWITCH, HOST = "denoise", "kv_cache_update", "decode", "switch", "host"
SLOTS = 2  # the long video's session, and one beside it
PHASES = (DENOISE, KV_CACHE_UPDATE, DECODE, HOST)  # of a chunk without a switch


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is measured."""

    chunks: int
    """Measured chunks; half as many first frames and prompt switches."""
    warmup: int
    """Unmeasured chunks of the session before them."""
    live_seconds: float
    max_sessions: int

    @property
    def events(self) -> int:
        return max(2, self.chunks // 2)

    @property
    def slots(self) -> int:
        return max(SLOTS, self.max_sessions)

    @property
    def steps(self) -> int:
        """Approximate number of `on_step` calls per row."""
        return self.warmup + self.chunks + 2 * self.events + 2 + self.max_sessions


class SingleSession:
    """Measures one session at a time, on a warmed-up model runner with two slots or more."""

    def __init__(self, runner: ModelRunner, plan: Plan, on_step: Callable[[str], None]) -> None:
        """`on_step`: called with the name of each finished step."""
        self.runner, self.plan, self.on_step = runner, plan, on_step
        self.counter = itertools.count()
        self.session = self.new_session(slot=0)
        """A long video; other measured sessions use slot 1."""

    def measure(self) -> dict[str, Any]:
        """All results of the row, in seconds and bytes."""
        chunks = self.chunks()
        num_frames = self.runner.config.window.chunk * FRAMES_PER_LATENT
        results: dict[str, Any] = {
            "chunk_s": spread([sum(chunk.values()) for chunk in chunks]),
            "phases_s": {phase: spread([chunk[phase] for chunk in chunks]) for phase in PHASES},
            "dit_s": spread([chunk[DENOISE] + chunk[KV_CACHE_UPDATE] for chunk in chunks]),
            "first_frame_s": self.first_frames(),
            **self.switches(),
            "session_bytes": self.session_bytes(),
        }
        results["dit_fps"] = num_frames / results["dit_s"]["median"]
        results["fps"] = num_frames / results["chunk_s"]["median"]
        return results

    def chunks(self) -> list[dict[str, float]]:
        """Seconds per phase, for chunks in the middle of a video; the phases sum up to the chunk's time."""
        chunks = []
        for _ in range(max(self.plan.warmup, self.runner.window.capacity + 1)):  # until the window rolls
            self.advance(self.session, "warm-up")
        for _ in range(self.plan.chunks):
            seconds = self.runner.advance(self.session).seconds  # includes the previous chunk's KV-cache update
            self.on_step("chunks")
            phases = {phase: self.phase_seconds(phase) for phase in PHASES}
            chunks.append(phases | {HOST: seconds - sum(phases.values())})
        return chunks

    def first_frames(self) -> dict[str, float]:
        """From the start of a session to the frames of its first chunk."""
        for _ in range(WARM_UP):
            self.runner.advance(self.new_session())
        return spread([self.advance(self.new_session(), "first frames") for _ in range(self.plan.events)])

    def switches(self) -> dict[str, Any]:
        """From a new prompt, at a chunk boundary, to its first frames; and its encoding and recache times."""
        seconds, phases = [], []
        for index in range(WARM_UP + self.plan.events):
            self.session.add_prompt(PROMPTS[(index + 1) % len(PROMPTS)])
            seconds.append(self.advance(self.session, "prompt switches"))
            phases.append(self.phase_seconds(SWITCH))
        encode = self.encode_seconds()
        recaches = [max(0.0, phase - encode["median"]) for phase in phases[WARM_UP:]]
        return {"switch_s": spread(seconds[WARM_UP:]), "encode_s": encode, "recache_s": spread(recaches)}

    @torch.inference_mode()
    def encode_seconds(self) -> dict[str, float]:
        """The work of a switch before the recache: text encoder, and the prompt's cross-attention keys and values."""
        backends = self.runner.backends
        self.on_step("text encoder")

        def embed() -> None:
            encoded = backends.text_encoder.encode(PROMPTS[0])
            backends.dit.embed_prompt(encoded.embeds, encoded.tokens)

        return seconds_of(embed, backends.device, self.plan.events)

    def session_bytes(self) -> dict[str, int]:
        """Bytes per additional session: its KV-cache slot, and the tensors it holds once its window is full."""
        backends, before = self.runner.backends, 0
        if on_cuda := backends.device.startswith("cuda"):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
        session = self.new_session()
        for _ in range(self.runner.window.capacity + 1):
            self.runner.advance(session)
        self.on_step("memory")
        num_bytes = torch.cuda.memory_allocated() - before if on_cuda else _tensor_bytes(session)
        slot = KVCache.bytes_of(self.runner.config, 1, backends.dit.cache_dtype)
        return {"slot": slot, "held": num_bytes, "total": slot + num_bytes}

    def new_session(self, slot: int = 1) -> Session:
        index = next(self.counter)
        prompt = Prompt(index=0, text=PROMPTS[0])
        return Session(id=f"bench-{index}", prompt=prompt, noise=SeededNoise(index), slot=slot)

    def advance(self, session: Session, step: str) -> float:
        """Seconds until the next chunk's frames are complete, on an otherwise idle device."""
        if self.runner.backends.device.startswith("cuda"):
            torch.cuda.synchronize()  # the previous chunk's KV-cache update
        start = time.perf_counter()
        for _ in self.runner.collect_output(self.runner.execute_model_async(session)):
            seconds = time.perf_counter() - start
        self.on_step(step)
        return seconds

    def phase_seconds(self, name: str) -> float:
        """Seconds of a phase in the last chunk."""
        return sum(phase.seconds for phase in self.runner.phases if phase.name == name)


def _tensor_bytes(session: Session) -> int:
    """Bytes of a session's tensors, each counted once."""
    assert session.decoder_cache is not None
    assert session.prompt_kv is not None
    tensors = [
        *session.decoder_cache,
        *session.prompt_kv,
        *session.context_latents,
        *(one.latents for one in session.sink),
    ]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
