# SPDX-License-Identifier: Apache-2.0
"""A stream that asks several servers for a slot before it waits, against a scripted server over real gRPC."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from longlive_client import errors, retry_policy
from longlive_client.video_stream import VideoStream
from longlive_serve.protocol.messages import SESSION_HEADER
from tests.fakes.scripted_triton import (
    Conversation,
    Received,
    ScriptedTriton,
    Sequel,
    acknowledgement,
    breaks_after,
    chunk,
    ends_after,
    error,
    full,
    recorded,
)
from tests.fakes.service_bench import LIMIT_S, wait_until
from tests.support.both_streams import Open, indices


def waits(script: Sequel) -> list[float | None]:
    """How long each START would wait."""
    return [start.options.max_wait_s for start in script.starts]


def test_a_server_without_a_slot_is_left_for_another_under_a_new_id(stream: Open) -> None:
    headers: list[str] = []

    def notes_header(conversation: Conversation) -> Iterator[Any]:
        headers.append(dict(conversation.context.invocation_metadata())[SESSION_HEADER])
        yield from script(conversation)

    script = Sequel(full, full, ends_after(0, 1))
    with ScriptedTriton(notes_header) as server, stream("a fox", url=server.url, chunks=2, seed=4) as video:
        assert indices(video) == [0, 1]
        assert video.session_id == script.starts[-1].session_id
    assert headers == [start.session_id for start in script.starts]
    assert len(set(headers)) == 3
    assert waits(script) == [0, 0, 0]
    assert [(start.prompt, start.tensors["SEED"].tolist(), start.chunks) for start in script.starts] == [
        ("a fox", [4], 2)
    ] * 3
    assert {start.options.session_token for start in script.starts} == {video.session_token}


def test_a_session_that_is_refused_is_ended() -> None:
    seen: list[Received] = []
    script = Sequel(full, full, ends_after(0))
    with ScriptedTriton(recorded(script, seen)) as server, VideoStream("a fox", url=server.url, chunks=1) as video:
        assert indices(video) == [0]
    assert video.resumed == 0
    assert {request.session_id for request in seen if request.end} == {start.session_id for start in script.starts}


def test_it_asks_on_though_nobody_wants_a_chunk_yet() -> None:
    script = Sequel(full, full, ends_after(0))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=1):
        wait_until(lambda: len(script.starts) == 3)


def test_only_the_last_try_waits(stream: Open) -> None:
    def lets_it_wait(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield acknowledgement(start, notice="waiting for a slot: place 1 of 1", final=False)
        yield from ends_after(0)(conversation, start)

    script = Sequel(full, full, lets_it_wait)
    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=1, max_attempts=3) as video:
        chunks = list(video.chunks())
    assert [(item.notice, len(item.frames)) for item in chunks] == [("waiting for a slot: place 1 of 1", 0), ("", 9)]
    assert waits(script) == [0, 0, None]


def test_where_every_server_is_full_the_last_word_is_raised(stream: Open) -> None:
    def full_queue(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield error(start, "[unavailable] 16 sessions are waiting for a slot already; try again in 30 s")
        yield error(conversation.next(), "[unknown_session] it has ended")

    script = Sequel(full, full_queue)
    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1, max_attempts=2)
        with pytest.raises(errors.UnavailableError, match="waiting for a slot already; try again in 30 s"), video:
            indices(video)
    assert waits(script) == [0, None]


def test_with_one_try_it_waits_at_the_first(stream: Open) -> None:
    script = Sequel(full)
    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1, max_attempts=1)
        with pytest.raises(errors.UnavailableError), video:
            indices(video)
    assert waits(script) == [None]
    with pytest.raises(errors.InvalidRequestError, match="max_attempts: got 0, expected 1 to"):
        stream("a fox", max_attempts=0)


GOING = (
    "[shutting_down] the server is shutting down; connect again later",
    "Server is stopping, scheduler for model has stopped accepting new inference requests",  # Triton itself
)


@pytest.mark.parametrize("words", GOING)
def test_a_server_that_is_about_to_go_is_left_for_another(stream: Open, words: str) -> None:
    def goes(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield error(start, words)
        yield error(conversation.next(), words)

    script = Sequel(goes, goes, ends_after(0))
    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=1) as video:
        assert indices(video) == [0]
    assert waits(script) == [0, 0, 0]
    with ScriptedTriton(Sequel(goes, goes)) as server:
        video = stream("a fox", url=server.url, chunks=1, max_attempts=2)
        with pytest.raises(errors.ServerShutdownError), video:
            indices(video)


@pytest.mark.parametrize("kind", ["invalid_request", "forbidden", "rate_limited", "session_exists"])
def test_who_is_refused_for_another_reason_does_not_ask_elsewhere(stream: Open, kind: str) -> None:
    def refuses(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield error(start, f"[{kind}] no")
        yield error(conversation.next(), "[unknown_session] it has ended")

    script = Sequel(refuses)
    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1)
        with pytest.raises(errors.VideoStreamError) as raised, video:
            indices(video)
    assert raised.value.kind == kind
    assert len(script.starts) == 1


def test_a_prompt_for_a_session_that_is_refused_goes_to_the_next(stream: Open) -> None:
    def takes_the_prompt(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield acknowledgement(conversation.next(), prompt_index=1)
        yield from full(conversation, start)

    def has_room(conversation: Conversation, start: Received) -> Iterator[Any]:
        prompt = conversation.next()
        assert (prompt.prompt, prompt.options.at_latent_frame) == ("a bird", 30)
        yield acknowledgement(prompt, prompt_index=1)
        yield chunk(start, 0, prompt_index=1, final=True)
        yield acknowledgement(conversation.next())

    with (
        ScriptedTriton(Sequel(takes_the_prompt, has_room)) as server,
        stream("a fox", url=server.url, chunks=1) as video,
    ):
        assert video.switch_prompt("a bird", at_latent_frame=30) == 1
        assert [item.prompt_index for item in video.chunks()] == [1]


def test_a_session_that_breaks_off_asks_as_many_again() -> None:
    script = Sequel(full, breaks_after(0), full, full, ends_after(1))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=2, max_attempts=3) as video:
        assert indices(video) == [0, 1]
    assert video.resumed == 1
    assert waits(script) == [0, 0, 0, 0, None]
    assert {start.snapshot for start in script.starts[2:]} == {b"after 0"}
    assert len({start.session_id for start in script.starts}) == 5


def test_one_broken_server_among_full_ones_is_no_reason_to_give_up() -> None:
    script = Sequel(full, breaks_after(), full, ends_after(0))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=1, max_attempts=3) as video:
        assert indices(video) == [0]


def test_tries_last_no_longer_than_resume_for(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count(step=10)
    monkeypatch.setattr(retry_policy, "time", SimpleNamespace(monotonic=lambda: next(looks)))  # every try takes 10 s
    script = Sequel(breaks_after(0), *[full] * 100)
    with (
        ScriptedTriton(script) as server,
        VideoStream("a fox", url=server.url, chunks=2, max_attempts=100, resume_for=45.0) as video,
    ):
        chunks = video.chunks()
        assert len(next(chunks).frames)
        with pytest.raises(errors.UnavailableError):
            next(chunks)
    assert len(script.starts) == 1 + 5


def test_cancel_ends_the_tries(stream: Open) -> None:
    def full_and_cancelled(conversation: Conversation, start: Received) -> Iterator[Any]:
        video.cancel()
        yield from full(conversation, start)

    script = Sequel(*[full] * 20, full_and_cancelled, *[full] * 1000)
    with ScriptedTriton(script) as server, stream("a fox", url=server.url, max_attempts=1021) as video:
        assert list(video.chunks()) == []
    assert 21 <= len(script.starts) <= 22


def test_a_full_server_that_falls_silent_holds_nobody_up(stream: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_silent(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield error(start, "[unavailable] no slot is free")
        conversation.gone.wait()
        gone.set()

    gone = threading.Event()
    monkeypatch.setattr("longlive_client.connection.CLOSE_TIMEOUT_S", LIMIT_S)  # it is asked to end the session so long
    script = Sequel(falls_silent, ends_after(0))
    with ScriptedTriton(script) as server, stream("a fox", url=server.url) as video:
        assert len(next(video.chunks()).frames)
        assert not gone.is_set()
        video.cancel()
