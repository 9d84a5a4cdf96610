# SPDX-License-Identifier: Apache-2.0
"""Who waits for a slot, for how long, and who does not wait at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.session_options import Options
from tests.fakes.service_bench import FAST, Clock, bench, closed, wait_until

AT_ONCE = Options(pace="asap", max_wait_s=0)

pytestmark = pytest.mark.usefixtures("either_device")


def test_who_waits_is_told_the_place_in_the_queue() -> None:
    with bench(slots=1) as at:
        with at.held():
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
        assert refused.errors[0].kind == RequestError.UNAVAILABLE
        assert refused.errors[0].message == "1 sessions are waiting for a slot already; try again in 7.5 s"
        wait_until(lambda: at.figures["refused_sessions"] == 1)
        assert at.figures["failed_sessions"] == 0


def test_who_has_waited_too_long_is_refused(clock: Clock) -> None:
    with bench(slots=1, max_wait_s=0.2) as at:
        at.start("a")
        waiting = at.start("b")
        wait_until(lambda: bool(waiting.chunks))
        clock.go_on(0.2)
        wait_until(closed(waiting))
        assert waiting.errors[0].kind == RequestError.UNAVAILABLE
        assert "no slot became free in 0.2 s" in waiting.errors[0].message


def test_who_would_not_wait_is_refused_at_once_and_told_what_to_do() -> None:
    with bench(slots=1) as at:
        at.start("a")
        at.start("b")
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        refused = at.start("c", options=AT_ONCE)
        wait_until(closed(refused))
        assert not refused.chunks, "it was told a place in the queue"
        assert refused.errors[0].kind == RequestError.UNAVAILABLE
        what_to_do = "START with a new session id, for another server, or without OPTIONS.max_wait_s, to wait here"
        assert refused.errors[0].message == f"no slot is free; {what_to_do}"
        wait_until(lambda: at.figures["redirected_sessions"] == 1)
        assert at.figures["refused_sessions"] == at.figures["failed_sessions"] == 0
        assert at.figures["waiting_sessions"] == 1


def test_who_would_not_wait_is_admitted_where_there_is_room() -> None:
    with bench(slots=2) as at:
        with at.held():
            at.start("a")
            last = at.start("b", chunks=1, end=True, options=AT_ONCE)
            too_many = at.start("c", chunks=1, end=True, options=AT_ONCE)
        wait_until(closed(last, too_many))
        assert [len(chunk.frames) for chunk in last.chunks] == [9]
        assert [error.kind for error in too_many.errors] == [RequestError.UNAVAILABLE]


def test_a_slot_that_becomes_free_in_the_same_turn_is_room() -> None:
    with bench(slots=1) as at:
        live = at.start("a")
        wait_until(lambda: bool(live.chunks))
        at.runner.gate.clear()
        wait_until(at.runner.held.is_set)
        next_one = at.start("b", chunks=1, end=True, options=AT_ONCE)
        at.ask("a", end=True)
        at.runner.gate.set()
        wait_until(closed(next_one))
        assert not next_one.errors


def test_a_wait_shorter_than_the_servers_is_kept(clock: Clock) -> None:
    with bench(slots=1, max_wait_s=60.0) as at:
        at.start("a")
        waiting = at.start("b", options=Options(pace="asap", max_wait_s=0.3))
        wait_until(lambda: bool(waiting.chunks))
        clock.go_on(0.29)
        wait_until(closed(at.ask("a")))
        assert not waiting.closed
        clock.go_on(0.02)
        wait_until(closed(waiting))
        assert [chunk.notice for chunk in waiting.chunks] == ["waiting for a slot: place 1 of 1"]
        assert waiting.errors[0].message.startswith("no slot became free in 0.3 s; START with a new session id")
        wait_until(lambda: at.figures["redirected_sessions"] == 1)
        assert at.figures["refused_sessions"] == 0


def test_nobody_waits_longer_than_the_server_lets(clock: Clock) -> None:
    with bench(slots=1, max_wait_s=0.2) as at:
        at.start("a")
        waiting = at.start("b", options=Options(pace="asap", max_wait_s=60.0))
        wait_until(lambda: bool(waiting.chunks))
        clock.go_on(0.2)
        wait_until(closed(waiting))
        assert waiting.errors[0].message == "no slot became free in 0.2 s; try again in 0.2 s"
        wait_until(lambda: at.figures["refused_sessions"] == 1)
        assert at.figures["redirected_sessions"] == 0


def test_one_that_resumes_and_would_not_wait_pushes_nobody_out_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    def session(data: bytes, session_id: str, *others: object) -> Session:
        return Session(id=session_id, prompt=Prompt(index=0, text="a fox"), noise=SeededNoise(0), next_chunk=3)

    monkeypatch.setattr("longlive_serve.engine.session_manager.load_session", session)
    with bench(slots=1, max_waiting=1) as at:
        at.runner.dtype = torch.float32
        first, waiting = at.start("a"), at.start("b", chunks=1, end=True)
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        again: dict[str, Any] = {"prompt": None, "snapshot": b"s", "chunks": 1, "end": True}
        refused = at.start("c", **again, options=AT_ONCE)
        wait_until(closed(refused))
        assert at.figures["resumed_sessions"] == 0
        at.ask("a", end=True)
        wait_until(closed(first, waiting))
        assert not waiting.errors
        assert [chunk.notice for chunk in waiting.chunks] == [
            "waiting for a slot: place 1 of 1",
            "a slot is free: generating",
            "",
        ]
        wait_until(closed(at.start("d", **again, options=FAST)))
        wait_until(lambda: at.figures["resumed_sessions"] == 1)
