# SPDX-License-Identifier: Apache-2.0
"""The service's promises, with a pipeline that only counts."""

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
import pytest
import torch

from longlive_serve.config import PRESETS, ServeConfig
from longlive_serve.pipeline import Pipeline
from longlive_serve.protocol import FrameChunk, Options, Request, ServeError
from longlive_serve.service import VideoService
from longlive_serve.session import Session
from longlive_serve.statistics import Change
from longlive_serve.trace import Phase

LIMIT_S = 10.0
FAST = Options(pace="asap")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


class CountingPipeline:
    """Advances sessions without networks. `gate` holds the worker inside a chunk while it is cleared."""

    config = PRESETS["tiny"]
    engines = SimpleNamespace(name="none", device="cpu", dtype="float32")
    phases: tuple[Phase, ...] = ()

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.turns: list[str] = []
        self.slots: dict[str, int] = {}

    def first_frame(self, chunk: int) -> int:
        return 12 * chunk - 3 if chunk else 0

    def advance(self, session: Session, send_early: Callable[[FrameChunk], None] | None = None) -> FrameChunk:
        self.gate.wait(LIMIT_S)
        self.turns.append(session.id)
        self.slots[session.id] = session.slot
        if session.prompt.text == "explode":
            raise RuntimeError("a network failed")
        if session.pending:
            session.prompt = session.pending.pop(0)
        chunk = session.chunk
        session.chunk += 1
        session.recent.append(torch.zeros(1))
        frames = np.zeros((12 if chunk else 9, 2, 2, 3), np.uint8)
        parts = np.split(frames, [1 if chunk == 0 else 4, 5 if chunk == 0 else 8]) if send_early else [frames]
        first, index = self.first_frame(chunk), session.prompt.index
        for part in parts[:-1]:
            assert send_early is not None
            send_early(FrameChunk(frames=part, first_frame=first, prompt_index=index))
            first += len(part)
        return FrameChunk(frames=parts[-1], first_frame=first, prompt_index=index, seconds=0.1)


class RecordingSink:
    """Remembers what was sent and by which thread."""

    def __init__(self, *, broken: bool = False) -> None:
        self.chunks: list[FrameChunk] = []
        self.errors: list[ServeError] = []
        self.closed = 0
        self.cancelled = False
        self.broken = broken
        self.threads: set[str] = set()

    def send(self, chunk: FrameChunk | None, final: bool) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.closed, "sent after the end"
        if self.broken and chunk is not None:
            raise ConnectionError("the wire is cut")
        if chunk is not None:
            self.chunks.append(chunk)
        self.closed += final

    def fail(self, error: ServeError) -> None:
        self.threads.add(threading.current_thread().name)
        assert not self.closed, "failed after the end"
        self.errors.append(error)
        self.closed += 1

    def is_cancelled(self) -> bool:
        return self.cancelled


@dataclasses.dataclass
class Bench:
    """A service under test."""

    pipeline: CountingPipeline
    service: VideoService
    figures: dict[str, float]
    """By name; those with labels under the last of them."""

    def ask(self, session_id: str, sink: RecordingSink | None = None, **request: Any) -> RecordingSink:
        sink = sink or RecordingSink()
        self.service.submit(Request(session_id=session_id, **request), sink)
        return sink

    def start(self, session_id: str, sink: RecordingSink | None = None, **request: Any) -> RecordingSink:
        return self.ask(session_id, sink, **{"start": True, "prompt": "a fox", "options": FAST} | request)


@contextmanager
def bench(**settings: Any) -> Iterator[Bench]:
    pipeline, figures = CountingPipeline(), collections.defaultdict[str, float](float)

    def note(changes: Sequence[Change]) -> None:
        figures.update({name: value for name, _, value in changes})

    config = ServeConfig(**{"max_waiting": 1000, "max_unread": 10**9, "max_requests_per_s": 10**9} | settings)
    service = VideoService(cast(Pipeline, pipeline), config, note)
    try:
        yield Bench(pipeline, service, figures)
    finally:
        pipeline.gate.set()
        service.stop()
    assert figures["live_sessions"] == figures["waiting_sessions"] == 0
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("longlive-")]


def closed(*sinks: RecordingSink) -> Callable[[], bool]:
    return lambda: all(sink.closed for sink in sinks)


def test_a_request_gets_its_chunks_and_one_end() -> None:
    with bench() as at:
        sink = at.start("a", chunks=3, end=True)
        wait_until(closed(sink))
        assert [chunk.first_frame for chunk in sink.chunks] == [0, 9, 21]
        wait_until(lambda: at.figures["chunks"] == 3)


def test_more_chunks_are_answers_to_the_request_that_asked_for_them() -> None:
    with bench() as at:
        first = at.start("a", chunks=2)
        second = at.ask("a", chunks=1, prompt="a bird", end=True)
        wait_until(closed(first, second))
        assert [chunk.first_frame for chunk in first.chunks + second.chunks] == [0, 9, 21]
        wait_until(lambda: at.figures["live_sessions"] == 0)


def test_sessions_take_turns_and_the_third_waits_for_a_slot() -> None:
    with bench(slots=2) as at:
        at.pipeline.gate.clear()
        sinks = [at.start(name, chunks=3, end=True) for name in "abcd"]
        wait_until(at.service._mail.empty)
        at.pipeline.gate.set()
        wait_until(closed(*sinks))
        turns = "".join(at.pipeline.turns)
        assert turns.index("c") > turns.index("a", turns.index("a") + 1)
        assert sorted(turns) == sorted("abcd" * 3)
        assert [turns.rindex(name) for name in "abcd"] == sorted(turns.rindex(name) for name in "abcd")
        assert set(at.pipeline.slots.values()) == {0, 1}


def test_a_prompt_update_is_acknowledged_with_its_index() -> None:
    with bench() as at:
        video = at.start("a")
        ack = at.ask("a", prompt="a bird")
        wait_until(closed(ack))
        assert [len(chunk.frames) for chunk in ack.chunks] == [0]
        assert ack.chunks[0].prompt_index == 1
        wait_until(lambda: bool(video.chunks) and video.chunks[-1].prompt_index == 1)
        later = at.ask("a", prompt="a cat", options=Options(at_latent_frame=3000))
        heartbeat = at.ask("a")
        wait_until(closed(later, heartbeat))
        assert later.chunks[0].prompt_index == 2


def test_end_alone_stops_at_the_next_border() -> None:
    with bench() as at:
        video = at.start("a")
        wait_until(lambda: len(video.chunks) > 2)
        end = at.ask("a", end=True)
        wait_until(closed(video, end))
        assert not video.errors
        assert not end.errors


def test_requests_that_cannot_be_taken_disturb_nobody() -> None:
    with bench() as at:
        video = at.start("a")
        again = at.start("a")
        unknown = at.ask("b", prompt="a bird")
        refused = RecordingSink()
        at.service.submit(ServeError(ServeError.INVALID_REQUEST, "CHUNKS: got -1"), refused)
        wait_until(closed(again, unknown, refused))
        assert [sink.errors[0].kind for sink in (again, unknown, refused)] == [
            ServeError.SESSION_EXISTS,
            ServeError.UNKNOWN_SESSION,
            ServeError.INVALID_REQUEST,
        ]
        seen = len(video.chunks)
        wait_until(lambda: len(video.chunks) > seen)


def test_a_failing_session_ends_with_its_own_error() -> None:
    with bench() as at:
        other = at.start("a")
        failing = at.start("b", prompt="explode")
        wait_until(closed(failing))
        assert failing.errors[0].kind == ServeError.INTERNAL
        assert "a network failed" in failing.errors[0].message
        seen = len(other.chunks)
        wait_until(lambda: len(other.chunks) > seen and at.figures["failed_sessions"] == 1)
        assert at.figures["live_sessions"] == 1


def test_a_cut_wire_ends_one_session() -> None:
    with bench() as at:
        other = at.start("a")
        cut = at.start("b", RecordingSink(broken=True))
        wait_until(closed(cut))
        seen = len(other.chunks)
        wait_until(lambda: len(other.chunks) > seen)


@pytest.mark.parametrize("gone", ["live", "waiting"])
def test_a_cancelled_client_leaves_at_the_next_border(gone: str) -> None:
    with bench(slots=1) as at:
        live = at.start("a")
        waiting = at.start("b")
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        {"live": live, "waiting": waiting}[gone].cancelled = True
        wait_until(closed(live if gone == "live" else waiting))
        wait_until(lambda: (at.figures["live_sessions"], at.figures["waiting_sessions"]) == (1, 0))
        assert at.figures["failed_sessions"] == 0


def test_an_idle_session_gives_its_slot_to_one_that_waits() -> None:
    with bench(slots=1, idle_timeout_s=0.2) as at:
        idle = at.start("a", chunks=1)
        waiting = at.start("b", chunks=1, end=True)
        wait_until(closed(idle, waiting))
        assert not waiting.errors
        late = at.ask("a", prompt="anyone?")
        wait_until(closed(late))
        assert late.errors[0].kind == ServeError.UNKNOWN_SESSION


def test_a_heartbeat_keeps_an_idle_session() -> None:
    with bench(slots=1, idle_timeout_s=0.5) as at:
        wait_until(closed(at.start("a", chunks=1)))
        for _ in range(8):
            time.sleep(0.1)
            beat = at.ask("a")
            wait_until(closed(beat))
            assert not beat.errors


def test_stopping_tells_every_session() -> None:
    with bench(slots=1) as at:
        live, waiting = at.start("a"), at.start("b")
        wait_until(lambda: bool(live.chunks))
        at.service.stop()
        assert live.errors[0].kind == waiting.errors[0].kind == ServeError.SHUTTING_DOWN


def test_a_draining_service_refuses_whoever_comes() -> None:
    with bench() as at:
        live = at.start("a")
        wait_until(lambda: bool(live.chunks))
        at.service.drain()
        wait_until(closed(live))
        late = at.start("b")
        wait_until(closed(late))
        assert live.errors[0].kind == late.errors[0].kind == ServeError.SHUTTING_DOWN


def test_one_thread_does_every_send() -> None:
    with bench() as at:
        sinks = [at.start(str(n), chunks=2, end=True) for n in range(8)] + [at.ask("x"), at.start("0")]
        wait_until(closed(*sinks))
        assert {name for sink in sinks for name in sink.threads} == {"longlive-outbox"}


def test_hundreds_of_sessions_leave_nothing_behind() -> None:
    with bench(slots=2) as at:
        sinks = [at.start(str(n), chunks=1, end=True) for n in range(300)]
        wait_until(closed(*sinks))
        assert not len(at.service._sessions)
        assert set(at.pipeline.slots.values()) == {0, 1}


def test_a_live_session_keeps_to_its_clock_and_an_offline_one_runs_free() -> None:
    with bench(slots=2) as at:
        live = at.start("live", options=Options(fps=120))  # a chunk plays for 0.1 s
        offline = at.start("offline")
        wait_until(lambda: len(live.chunks) == 6)
        assert at.figures["deadline_misses"] == 0
        assert len(offline.chunks) > 50
        began = time.monotonic()
        wait_until(lambda: len(live.chunks) == 12)
        assert 0.4 < time.monotonic() - began < 1.5


def test_a_late_chunk_is_counted() -> None:
    with bench(slots=1) as at:
        live = at.start("live", options=Options(fps=120))
        wait_until(lambda: len(live.chunks) == 2)
        at.pipeline.gate.clear()
        time.sleep(0.5)
        at.pipeline.gate.set()
        wait_until(lambda: at.figures["deadline_misses"] == 1)
        seen = len(live.chunks)
        wait_until(lambda: len(live.chunks) == seen + 3)
        assert at.figures["deadline_misses"] == 1, "playback goes on from the late chunk"


def test_who_waits_is_told_the_place_in_the_queue() -> None:
    with bench(slots=1) as at:
        first, second, third = (at.start(name, chunks=1 if name == "b" else None) for name in "abc")
        wait_until(lambda: bool(third.chunks))
        assert [chunk.notice for chunk in second.chunks + third.chunks] == [
            "waiting for a slot: place 1 of 2",
            "waiting for a slot: place 2 of 2",
        ]
        assert all(len(chunk.frames) == 0 for chunk in second.chunks + third.chunks)
        at.ask("a", end=True)
        wait_until(closed(first, second))
        assert [chunk.notice for chunk in second.chunks[1:]] == ["a slot is free: generating", ""]
        assert third.chunks[-1].notice == "waiting for a slot: place 1 of 1"


def test_beyond_the_queue_a_session_is_refused_with_a_hint() -> None:
    with bench(slots=1, max_waiting=1, max_wait_s=7.5) as at:
        at.start("a")
        at.start("b")
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        refused = at.start("c")
        wait_until(closed(refused))
        assert refused.errors[0].kind == ServeError.UNAVAILABLE
        assert refused.errors[0].message == "1 sessions are waiting for a slot already; try again in 7.5 s"
        wait_until(lambda: at.figures["refused_sessions"] == 1)
        assert at.figures["failed_sessions"] == 0


def test_who_has_waited_too_long_is_refused() -> None:
    with bench(slots=1, max_wait_s=0.2) as at:
        at.start("a")
        waiting = at.start("b")
        wait_until(closed(waiting))
        assert waiting.errors[0].kind == ServeError.UNAVAILABLE
        assert "no slot became free in 0.2 s" in waiting.errors[0].message


def test_a_session_may_not_pile_up_prompts() -> None:
    with bench() as at:
        video = at.start("a", chunks=1)
        wait_until(closed(video))
        sinks = [at.ask("a", prompt="later", options=Options(at_latent_frame=300 + n)) for n in range(70)]
        wait_until(closed(*sinks))
        assert [bool(sink.errors) for sink in sinks] == [False] * 64 + [True] * 6
        assert sinks[-1].errors[0].kind == ServeError.INVALID_REQUEST
        beat, end = at.ask("a"), at.ask("a", end=True)
        wait_until(closed(beat, end))
        assert not beat.errors + end.errors, "neither adds to what waits"


def test_a_probe_is_answered_by_the_worker_and_leaves_no_session() -> None:
    with bench(slots=1) as at:
        probe = at.ask("p", start=True, end=True)
        wait_until(closed(probe))
        assert [chunk.notice for chunk in probe.chunks] == ["ready"]
        at.start("a")
        at.start("b")
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        probe = at.ask("p", start=True, end=True)
        wait_until(closed(probe))
        assert [chunk.notice for chunk in probe.chunks] == ["full: 1 sessions are live, 1 wait"]
        assert len(at.service._sessions) == 2
        at.service.drain()
        probe = at.ask("p", start=True, end=True)
        wait_until(closed(probe))
        assert probe.errors[0].kind == ServeError.SHUTTING_DOWN


def test_only_who_knows_the_token_has_a_say() -> None:
    own = Options(token="s" * 16)
    with bench() as at:
        wait_until(closed(at.start("a", chunks=1, options=dataclasses.replace(own, pace="asap"))))
        for token in (None, "w" * 16):
            for request in ({}, {"prompt": "a cat"}, {"chunks": 1}, {"end": True}):
                stranger = at.ask("a", **request, options=Options(token=token))
                wait_until(closed(stranger))
                assert stranger.errors[0].kind == ServeError.FORBIDDEN
        more = at.ask("a", prompt="a bird", chunks=2, options=own)
        wait_until(closed(more))
        assert [(chunk.first_frame, chunk.prompt_index) for chunk in more.chunks] == [(9, 1), (21, 1)]


def test_a_session_whose_chunks_may_lie_unread_pauses_until_its_next_request() -> None:
    with bench(max_unread=16) as at:
        video = at.start("a")
        wait_until(lambda: len(video.chunks) == 16)
        time.sleep(0.1)
        assert len(video.chunks) == 16
        wait_until(closed(at.ask("a")))
        wait_until(lambda: len(video.chunks) == 32)
        other = at.start("b", chunks=2, end=True)
        wait_until(closed(other))


def test_requests_come_only_so_often() -> None:
    with bench(max_requests_per_s=2) as at:
        at.start("a")
        answers = [at.ask("a") for _ in range(4)]
        wait_until(closed(*answers))
        kinds = [error.kind for answer in answers for error in answer.errors]
        assert kinds == [ServeError.RATE_LIMITED] * 2
        assert not at.start("b", chunks=1, end=True).errors


def test_draining_hands_out_a_last_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlive_serve.sessions.dump", lambda session, network: f"at {session.chunk}".encode())
    with bench() as at:
        with_snapshots = at.start("a", options=Options(pace="asap", snapshot_every=10**6))
        without = at.start("b")
        wait_until(lambda: len(with_snapshots.chunks) > 2 and len(without.chunks) > 2)
        at.service.drain()
        wait_until(closed(with_snapshots, without))
        last = with_snapshots.chunks[-1]
        assert not len(last.frames)
        assert (last.notice, last.first_frame) == (
            "the server is shutting down",
            12 * (len(with_snapshots.chunks) - 1) - 3,
        )
        assert last.snapshot == f"at {len(with_snapshots.chunks) - 1}".encode()
        assert len(without.chunks[-1].frames)
        assert {sink.errors[0].kind for sink in (with_snapshots, without)} == {ServeError.SHUTTING_DOWN}


def test_early_frames_leave_in_parts_and_count_as_one_chunk() -> None:
    with bench() as at:
        video = at.start("a", chunks=2, end=True, options=Options(pace="asap", early_frames=True))
        wait_until(closed(video))
        assert [(chunk.first_frame, len(chunk.frames)) for chunk in video.chunks] == [
            (0, 1), (1, 4), (5, 4), (9, 4), (13, 4), (17, 4)
        ]  # fmt: skip
        assert [chunk.completes for chunk in video.chunks] == [False, False, True] * 2
        wait_until(lambda: at.figures["chunks"] == 2)
        assert at.figures["frames"] == 21


def test_what_viewers_wait_for_is_counted() -> None:
    with bench() as at:
        wait_until(closed(at.start("a", chunks=2)))
        wait_until(closed(at.ask("a", chunks=1, prompt="a bird", end=True)))
        wait_until(lambda: at.figures["chunks"] == 3)
        counts = {
            name: at.figures[f"{name}_count"] for name in ("first_frame_seconds", "switch_seconds", "chunk_seconds")
        }
        assert counts == {"first_frame_seconds": 1, "switch_seconds": 1, "chunk_seconds": 3}
        assert at.figures["bytes"] == (9 + 12 + 12) * 2 * 2 * 3
        assert at.figures["kv_cache_bytes"] == 2 * 2 * 8 * 64 * 72 * 4  # both, layers, slots, dim, tokens, float32
