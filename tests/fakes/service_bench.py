# SPDX-License-Identifier: Apache-2.0
"""An engine core under test, with a model runner that only counts and senders that record."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.client_stream import Encode
from longlive_serve.engine.core import EngineCore
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Session
from longlive_serve.observability.metrics import MetricUpdate
from longlive_serve.observability.tracing import Phase
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk, Request
from longlive_serve.protocol.session_options import Options

LIMIT_S = 60.0  # timeout for any event, also on a busy machine
FAST = Options(pace="asap")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)


class Clock:
    """A clock that only the test advances."""

    def __init__(self) -> None:
        self._now = 10**12

    def monotonic_ns(self) -> int:
        return self._now

    def monotonic(self) -> float:
        return self._now / 10**9

    def go_on(self, seconds: float) -> None:
        self._now += round(seconds * 10**9)


class CountingModelRunner:
    """Advances sessions without models. While `gate` is cleared, the worker blocks inside a chunk; if `asynchronous`,
    chunks stay in flight."""

    config = PRESETS["tiny"]
    backends = SimpleNamespace(
        name="none", device="cpu", dtype="float32", dit=SimpleNamespace(cache_dtype=torch.float32)
    )
    phases: tuple[Phase, ...] = ()
    asynchronous = False
    dtype = torch.float32

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()
        """Set when the worker has reached the closed gate."""
        self.turns: list[str] = []
        self.slots: dict[str, int] = {}

    def first_frame(self, chunk: int) -> int:
        return 12 * chunk - 3 if chunk else 0

    def execute_model_async(self, session: Session, partial_chunks: bool = False) -> Sequence[FrameChunk]:
        self.turns.append(session.id)
        self.slots[session.id] = session.slot
        if not self.asynchronous:
            self._pass_gate()
        if session.prompt.text == "explode":
            raise RuntimeError("a model failed")
        if session.pending:
            session.prompt = session.pending.pop(0)
        chunk = session.next_chunk
        session.next_chunk += 1
        session.context_latents.append(torch.zeros(1))
        frames = np.zeros((12 if chunk else 9, 2, 2, 3), np.uint8)
        parts = np.split(frames, [1 if chunk == 0 else 4, 5 if chunk == 0 else 8]) if partial_chunks else [frames]
        first, made = self.first_frame(chunk), []
        for part in parts:
            made.append(FrameChunk(frames=part, first_frame=first, prompt_index=session.prompt.index))
            first += len(part)
        made[-1] = dataclasses.replace(made[-1], seconds=1e-4)
        return made

    def wait_until_denoised(self, chunk: Sequence[FrameChunk]) -> None:
        pass

    def collect_output(self, chunk: Sequence[FrameChunk]) -> Iterator[FrameChunk]:
        if self.asynchronous:
            self._pass_gate()
        yield from chunk

    def _pass_gate(self) -> None:
        if not self.gate.is_set():
            self.held.set()
            assert self.gate.wait(LIMIT_S), "the gate stayed closed"


class RecordingResponseSender:
    """Records the sent chunks and the sending threads."""

    def __init__(self, *, broken: bool = False) -> None:
        self.chunks: list[FrameChunk] = []
        self.errors: list[RequestError] = []
        self.closed = 0
        self.cancelled = False
        self.broken = broken
        self.threads: set[str] = set()

    def send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None = None) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.closed, "sent after the end"
        if self.broken and chunk is not None:
            raise ConnectionError("the wire is cut")
        if chunk is not None:
            self.chunks.append(chunk)
        self.closed += final

    def fail(self, error: RequestError) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.closed, "failed after the end"
        self.errors.append(error)
        self.closed += 1

    def is_cancelled(self) -> bool:
        return self.cancelled


@dataclasses.dataclass
class Bench:
    """A service under test."""

    runner: CountingModelRunner
    service: EngineCore
    figures: dict[str, float]
    """Metrics by name; for metrics with labels, the last update."""

    def ask(
        self, session_id: str, sender: RecordingResponseSender | None = None, **request: Any
    ) -> RecordingResponseSender:
        sender = sender or RecordingResponseSender()
        self.service.submit(Request(session_id=session_id, **request), sender)
        return sender

    def start(
        self, session_id: str, sender: RecordingResponseSender | None = None, **request: Any
    ) -> RecordingResponseSender:
        return self.ask(session_id, sender, **{"start": True, "prompt": "a fox", "options": FAST} | request)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Block the worker, so that it gets all requests of the context at once. Session `nobody` holds a slot."""
        self.runner.gate.clear()
        nobody = self.start("nobody", chunks=1, end=True)
        wait_until(self.runner.held.is_set)
        yield
        self.runner.turns = []
        self.runner.gate.set()
        wait_until(closed(nobody))
        self.runner.held.clear()


@contextmanager
def bench(**settings: Any) -> Iterator[Bench]:
    runner, figures = CountingModelRunner(), collections.defaultdict[str, float](float)

    def note(updates: Sequence[MetricUpdate]) -> None:
        figures.update({name: value for name, _, value in updates})

    config = ServeConfig(**{"max_waiting": 1000, "max_unacked": 10**9, "max_requests_per_s": 10**9} | settings)
    service = EngineCore(cast(ModelRunner, runner), config, note)
    try:
        yield Bench(runner, service, figures)
    finally:
        runner.gate.set()
        service.stop()
    assert figures["live_sessions"] == figures["waiting_sessions"] == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("longlive-")]


def closed(*senders: RecordingResponseSender) -> Callable[[], bool]:
    return lambda: all(sender.closed for sender in senders)


def has_chunks(sender: RecordingResponseSender, least: int) -> Callable[[], bool]:
    return lambda: len(sender.chunks) >= least
