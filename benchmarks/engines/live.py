# SPDX-License-Identifier: Apache-2.0
"""Finds how many live sessions one device sustains: pace `realtime`, through the server's engine core, in-process.

Frames are discarded: the figures include neither Triton nor gRPC nor a client.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from benchmarks.engines.prompts import PROMPTS
from benchmarks.timing import spread
from longlive_serve.config.presets import FPS, WindowConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.client_stream import Encode
from longlive_serve.engine.core import EngineCore
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.scheduler import SECOND, Scheduler
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk, Request
from longlive_serve.protocol.session_options import REALTIME, Options

UNBOUNDED = 1e6  # as max_utilization: no admission limit
CHUNK_FRAMES = WindowConfig().chunk_frames
CHUNK_PLAYS_S = CHUNK_FRAMES / FPS


class UnboundedScheduler(Scheduler):
    """Admits every session and records how late each chunk is."""

    def __init__(self, slots: int, cost: int) -> None:
        super().__init__(slots, chunk_frames=CHUNK_FRAMES, cost=cost, max_utilization=UNBOUNDED)
        self.lateness: list[float] = []
        """Seconds from a chunk's deadline to its completion; negative: early. First chunks have no deadline."""

    def done(self, session_id: str, now: int, frames: int, duration: int) -> int:
        session = self._session(session_id)
        if session.started is not None:
            self.lateness.append((now - session.deadline) / SECOND)
        return super().done(session_id, now, frames, duration)


class LiveEngineCore(EngineCore):
    """An engine core with an `UnboundedScheduler`."""

    def __init__(self, runner: ModelRunner, config: ServeConfig, chunk_s: float) -> None:
        super().__init__(runner, config, chunk_s=chunk_s)
        self.scheduler = UnboundedScheduler(config.slots, round(chunk_s * SECOND))
        self._sessions.scheduler = self.scheduler  # there are no sessions yet


class DiscardingResponseSender:
    """Counts the frames and discards them."""

    def __init__(self) -> None:
        self.frames = 0
        self.error: RequestError | None = None

    def send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None = None) -> None:
        self.frames += 0 if chunk is None else len(chunk.frames)

    def fail(self, error: RequestError) -> None:
        self.error = error

    def is_cancelled(self) -> bool:
        return False


def measure_live(
    runner: ModelRunner,
    config: ServeConfig,
    chunk_s: float,
    seconds: float,
    max_sessions: int,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """Run 1, 2, 3, ... sessions until chunks are late in two runs of the same number, or up to `max_sessions`.

    A late run is repeated once: the first one uses a slot for the first time, and a backend may still compile kernels
    or capture graphs. `chunk_s`: seconds per chunk from the warm-up. `announced`: the sessions that a server with
    `config.max_utilization` would admit.
    """
    config = dataclasses.replace(config, max_unacked=10**9)
    runs: list[dict[str, Any]] = []
    for sessions in range(1, max_sessions + 1):
        runner.prepare(sessions)  # captures CUDA graphs per size and slot: only for used slots
        for _ in range(2):
            on_step(f"{sessions} live sessions")
            runs.append(run_live(runner, config, chunk_s, seconds, sessions))
            if not runs[-1]["misses"]:
                break
        else:
            break
    cost, max_utilization = round(chunk_s * SECOND), config.max_utilization
    scheduler = Scheduler(config.slots, chunk_frames=CHUNK_FRAMES, cost=cost, max_utilization=max_utilization)
    announced = scheduler.capacity(FPS)
    num_sessions = max((run["sessions"] for run in runs if not run["misses"]), default=0)
    return {"sessions": num_sessions, "most_tried": runs[-1]["sessions"], "announced": announced, "runs": runs}


def run_live(runner: ModelRunner, config: ServeConfig, chunk_s: float, seconds: float, sessions: int) -> dict[str, Any]:
    """Start `sessions` sessions, evenly spread over one chunk's playback time. Raises RequestError if one fails."""
    engine, senders = LiveEngineCore(runner, config, chunk_s), [DiscardingResponseSender() for _ in range(sessions)]
    try:
        for number, sender in enumerate(senders):
            options = Options(pace=REALTIME)
            prompt = PROMPTS[number % len(PROMPTS)]
            request = Request(session_id=f"live-{number}", start=True, prompt=prompt, seed=number, options=options)
            engine.submit(request, sender)
            time.sleep(CHUNK_PLAYS_S / sessions)
        time.sleep(seconds)
    finally:
        engine.stop()
    for sender in senders:
        if sender.error is not None and sender.error.kind != RequestError.SHUTTING_DOWN:
            raise sender.error
    lateness, num_without_frames = engine.scheduler.lateness, sum(not sender.frames for sender in senders)
    return {
        "sessions": sessions,
        "chunks": len(lateness),
        "misses": engine.scheduler.deadline_misses + num_without_frames,
        "lateness_s": spread(lateness) if lateness else None,
        "frames_per_s": sum(sender.frames for sender in senders) / (seconds + CHUNK_PLAYS_S),
    }
