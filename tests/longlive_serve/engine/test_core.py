# SPDX-License-Identifier: Apache-2.0
"""The service's promises, with a model runner that only counts."""

from __future__ import annotations

import threading

import pytest
import torch

from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.session_options import Options
from tests.fakes.service_bench import Clock, CountingModelRunner, RecordingResponseSender, bench, closed, wait_until

pytestmark = pytest.mark.usefixtures("either_device")


def test_a_request_gets_its_chunks_and_one_end() -> None:
    with bench() as at:
        sender = at.start("a", chunks=3, end=True)
        wait_until(closed(sender))
        assert [chunk.first_frame for chunk in sender.chunks] == [0, 9, 21]
        wait_until(lambda: at.figures["chunks"] == 3)


def test_the_thread_that_computes_is_on_the_model_runners_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own begins on the first GPU, whichever the others are on."""
    used: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda name: used.append((threading.current_thread().name, name)))
    for device in ("cuda:1", "cuda", "cpu"):
        monkeypatch.setattr(CountingModelRunner.backends, "device", device)
        with bench() as at:
            wait_until(closed(at.start("a", chunks=1, end=True)))
    assert used == [("longlive-worker", "cuda:1")]


def test_more_chunks_are_answers_to_the_request_that_asked_for_them() -> None:
    with bench() as at:
        first = at.start("a", chunks=2)
        second = at.ask("a", chunks=1, prompt="a bird", end=True)
        wait_until(closed(first, second))
        assert [chunk.first_frame for chunk in first.chunks + second.chunks] == [0, 9, 21]
        wait_until(lambda: at.figures["live_sessions"] == 0)


def test_sessions_take_turns_and_the_third_waits_for_a_slot() -> None:
    with bench(slots=2) as at:
        with at.held():
            senders = [at.start(name, chunks=3, end=True) for name in "abcd"]
        wait_until(closed(*senders))
        turns = "".join(at.runner.turns)
        assert turns.index("c") > turns.index("a", turns.index("a") + 1)
        assert sorted(turns) == sorted("abcd" * 3)
        assert [turns.rindex(name) for name in "abcd"] == sorted(turns.rindex(name) for name in "abcd")
        assert set(at.runner.slots.values()) == {0, 1}


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
        refused = RecordingResponseSender()
        at.service.submit(RequestError(RequestError.INVALID_REQUEST, "CHUNKS: got -1"), refused)
        wait_until(closed(again, unknown, refused))
        assert [sender.errors[0].kind for sender in (again, unknown, refused)] == [
            RequestError.SESSION_EXISTS,
            RequestError.UNKNOWN_SESSION,
            RequestError.INVALID_REQUEST,
        ]
        seen = len(video.chunks)
        wait_until(lambda: len(video.chunks) > seen)


def test_a_failing_session_ends_with_its_own_error() -> None:
    with bench() as at:
        other = at.start("a")
        failing = at.start("b", prompt="explode")
        wait_until(closed(failing))
        assert failing.errors[0].kind == RequestError.INTERNAL
        assert "a model failed" in failing.errors[0].message
        seen = len(other.chunks)
        wait_until(lambda: len(other.chunks) > seen and at.figures["failed_sessions"] == 1)
        assert at.figures["live_sessions"] == 1


def test_a_cut_wire_ends_one_session() -> None:
    with bench() as at:
        other = at.start("a")
        cut = at.start("b", RecordingResponseSender(broken=True))
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


def test_an_idle_session_gives_its_slot_to_one_that_waits(clock: Clock) -> None:
    with bench(slots=1, idle_timeout_s=10) as at:
        idle = at.start("a", chunks=1)
        waiting = at.start("b", chunks=1, end=True)
        wait_until(lambda: bool(idle.closed and waiting.chunks))
        clock.go_on(11)
        wait_until(closed(idle, waiting))
        assert not waiting.errors
        late = at.ask("a", prompt="anyone?")
        wait_until(closed(late))
        assert late.errors[0].kind == RequestError.UNKNOWN_SESSION


def test_a_heartbeat_keeps_an_idle_session(clock: Clock) -> None:
    with bench(slots=1, idle_timeout_s=10) as at:
        wait_until(closed(at.start("a", chunks=1)))
        for _ in range(8):
            clock.go_on(9)
            beat = at.ask("a")
            wait_until(closed(beat))
            assert not beat.errors
        clock.go_on(11)
        wait_until(lambda: at.figures["live_sessions"] == 0)


def test_stopping_tells_every_session() -> None:
    with bench(slots=1) as at:
        live, waiting = at.start("a"), at.start("b")
        wait_until(lambda: bool(live.chunks))
        at.service.stop()
        assert live.errors[0].kind == waiting.errors[0].kind == RequestError.SHUTTING_DOWN


def test_a_draining_service_refuses_whoever_comes() -> None:
    with bench() as at:
        live = at.start("a")
        wait_until(lambda: bool(live.chunks))
        at.service.drain()
        wait_until(closed(live))
        late = at.start("b")
        wait_until(closed(late))
        assert live.errors[0].kind == late.errors[0].kind == RequestError.SHUTTING_DOWN


def test_one_thread_does_every_send() -> None:
    with bench() as at:
        senders = [at.start(str(n), chunks=2, end=True) for n in range(8)] + [at.ask("x"), at.start("0")]
        wait_until(closed(*senders))
        assert {name for sender in senders for name in sender.threads} == {"longlive-responses"}


def test_hundreds_of_sessions_leave_nothing_behind() -> None:
    with bench(slots=2) as at:
        senders = [at.start(str(n), chunks=1, end=True) for n in range(300)]
        wait_until(closed(*senders))
        assert not len(at.service._sessions)
        assert set(at.runner.slots.values()) == {0, 1}
