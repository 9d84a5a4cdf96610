# SPDX-License-Identifier: Apache-2.0
"""What the service keeps in bounds: clocks, tokens, rates, unread chunks; and what it counts."""

from __future__ import annotations

import dataclasses
import threading

import pytest

from longlive_serve.engine.response_writer import QueuedResponseSender
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import Request
from longlive_serve.protocol.session_options import Options
from tests.fakes.service_bench import Clock, bench, closed, has_chunks, wait_until

pytestmark = pytest.mark.usefixtures("either_device")


def test_a_live_session_keeps_to_its_clock_and_an_offline_one_runs_free(clock: Clock) -> None:
    with bench(slots=2, max_chunks_ahead=5) as at:
        live = at.start("live", options=Options(fps=12))  # a chunk plays for a second
        offline = at.start("offline")
        for ahead in range(6, 11):  # the one that plays and five more
            wait_until(has_chunks(live, ahead))
            wait_until(has_chunks(offline, len(offline.chunks) + 50))
            assert len(live.chunks) == ahead
            clock.go_on(1)
        assert at.figures["deadline_misses"] == 0


def test_a_late_chunk_is_counted(clock: Clock) -> None:
    with bench(slots=1) as at:
        live = at.start("live", options=Options(fps=12))
        wait_until(lambda: len(live.chunks) == 2)
        clock.go_on(5)  # the third was due after 2 s
        for seen in range(3, 6):
            wait_until(has_chunks(live, seen))
            wait_until(lambda: at.figures["deadline_misses"] == 1)
            clock.go_on(1)
        assert at.figures["deadline_misses"] == 1, "playback goes on from the late chunk"


def test_a_session_may_not_pile_up_prompts() -> None:
    with bench() as at:
        video = at.start("a", chunks=1)
        wait_until(closed(video))
        senders = [at.ask("a", prompt="later", options=Options(at_latent_frame=300 + n)) for n in range(70)]
        wait_until(closed(*senders))
        assert [bool(sender.errors) for sender in senders] == [False] * 64 + [True] * 6
        assert senders[-1].errors[0].kind == RequestError.INVALID_REQUEST
        beat, end = at.ask("a"), at.ask("a", end=True)
        wait_until(closed(beat, end))
        assert not beat.errors + end.errors, "neither adds to what waits"


def test_requests_without_end_leave_time_for_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    with bench() as at:
        handle, over = at.service._sessions.handle, threading.Event()

        def handle_again(request: Request, sender: QueuedResponseSender, draining: bool) -> None:
            if request.session_id != "flood":
                handle(request, sender, draining)
            elif not over.is_set():
                at.service.submit(request, sender)

        monkeypatch.setattr(at.service._sessions, "handle", handle_again)
        at.ask("flood")
        wait_until(has_chunks(at.start("a"), 3))
        over.set()


def test_the_command_health_is_answered_by_the_worker_and_leaves_no_session() -> None:
    with bench(slots=1) as at:
        health = at.ask("p", start=True, end=True, options=Options(command="health"))
        wait_until(closed(health))
        assert [chunk.notice for chunk in health.chunks] == ["ready"]
        at.start("a")
        at.start("b")
        wait_until(lambda: at.figures["waiting_sessions"] == 1)
        health = at.ask("p", start=True, end=True, options=Options(command="health"))
        wait_until(closed(health))
        assert [chunk.notice for chunk in health.chunks] == ["full: 1 sessions are live, 1 wait"]
        assert len(at.service._sessions) == 2
        at.service.drain()
        health = at.ask("p", start=True, end=True, options=Options(command="health"))
        wait_until(closed(health))
        assert health.errors[0].kind == RequestError.SHUTTING_DOWN


def test_only_who_knows_the_token_has_a_say() -> None:
    own = Options(session_token="s" * 16)
    with bench() as at:
        wait_until(closed(at.start("a", chunks=1, options=dataclasses.replace(own, pace="asap"))))
        for token in (None, "w" * 16):
            for request in ({}, {"prompt": "a cat"}, {"chunks": 1}, {"end": True}):
                stranger = at.ask("a", **request, options=Options(session_token=token))
                wait_until(closed(stranger))
                assert stranger.errors[0].kind == RequestError.FORBIDDEN
        more = at.ask("a", prompt="a bird", chunks=2, options=own)
        wait_until(closed(more))
        assert [(chunk.first_frame, chunk.prompt_index) for chunk in more.chunks] == [(9, 1), (21, 1)]


def test_a_session_whose_chunks_may_lie_unread_pauses_until_its_next_request() -> None:
    with bench(max_unacked=16) as at:
        video = at.start("a")
        for unread in (16, 32):
            wait_until(has_chunks(video, unread))
            other = at.start(f"b{unread}", chunks=10, end=True)
            wait_until(closed(other))
            assert len(video.chunks) == unread
            wait_until(closed(at.ask("a")))


def test_requests_come_only_so_often(clock: Clock) -> None:
    with bench(max_requests_per_s=2) as at:
        at.start("a")
        answers = [at.ask("a") for _ in range(4)]
        wait_until(closed(*answers))
        kinds = [error.kind for answer in answers for error in answer.errors]
        assert kinds == [RequestError.RATE_LIMITED] * 2
        other = at.start("b", chunks=1, end=True)
        clock.go_on(1.1)
        later = at.ask("a")
        wait_until(closed(other, later))
        assert not other.errors + later.errors


def test_draining_hands_out_a_last_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "longlive_serve.engine.session_manager.dump", lambda session, model: f"at {session.next_chunk}".encode()
    )
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
        assert {sender.errors[0].kind for sender in (with_snapshots, without)} == {RequestError.SHUTTING_DOWN}


def test_a_server_that_goes_first_gives_viewers_something_to_watch_meanwhile(clock: Clock) -> None:
    with bench(slots=2, max_chunks_ahead=1) as at:
        playing, soon = at.start("a", options=Options(fps=1)), at.start("b", options=Options(fps=1))
        wait_until(lambda: len(playing.chunks) == len(soon.chunks) == 2)  # the third is made in 9 s
        waiting = at.start("c")
        wait_until(lambda: bool(waiting.chunks))
        assert len(playing.chunks) == 2
        at.service.drain()
        wait_until(closed(waiting, playing, soon))
        assert [len(sender.chunks) for sender in (playing, soon)] == [4, 4]
        assert not any(len(chunk.frames) for chunk in waiting.chunks)
        assert {sender.errors[0].kind for sender in (playing, soon, waiting)} == {RequestError.SHUTTING_DOWN}


def test_it_does_not_work_ahead_for_long(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longlive_serve.engine.session_manager.DRAIN_S", 0.0)
    with bench(max_chunks_ahead=1) as at:
        playing = at.start("a", options=Options(fps=1))
        wait_until(lambda: len(playing.chunks) == 2)
        at.service.drain()
        wait_until(closed(playing))
        assert len(playing.chunks) == 2


def test_partial_chunks_are_sent_in_parts_and_count_as_one_chunk() -> None:
    with bench() as at:
        video = at.start("a", chunks=2, end=True, options=Options(pace="asap", stream_partial_chunks=True))
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
