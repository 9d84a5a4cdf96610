# SPDX-License-Identifier: Apache-2.0
"""A stream that goes on when its connection does not, against a scripted server over real gRPC."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from longlive_client import errors, retry_policy
from longlive_client.video_stream import VideoStream
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
from tests.fakes.service_bench import wait_until


def numbers(video: VideoStream) -> list[int]:
    return [int(item.frames[0, 0, 0, 0]) for item in video.chunks() if len(item.frames)]


def test_a_broken_session_goes_on_with_the_next_frame() -> None:
    script = Sequel(breaks_after(0, 1), breaks_after(2), ends_after(3, 4))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=5, seed=3) as video:
        chunks = list(video.chunks())
    assert [item.first_frame for item in chunks] == [0, 9, 21, 33, 45]
    assert video.resumed == 2
    first, second, third = script.starts
    assert (first.prompt, first.snapshot, first.chunks) == ("a fox", None, 5)
    assert (second.prompt, second.snapshot, second.chunks) == (None, b"after 1", 3)
    assert (third.snapshot, third.chunks) == (b"after 2", 2)
    assert len({start.session_id for start in script.starts}) == 3
    assert {start.options.session_token for start in script.starts} == {video.session_token}
    assert "SEED" in first.tensors
    assert "SEED" not in second.tensors


def test_what_comes_a_second_time_is_dropped() -> None:
    def old_snapshot(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield chunk(start, 0, snapshot=b"old")
        yield chunk(start, 1)
        yield chunk(start, 2)

    script = Sequel(old_snapshot, ends_after(1, 2, 3))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=4) as video:
        assert numbers(video) == [0, 1, 2, 3]
    assert script.starts[1].snapshot == b"old"


def test_a_prompt_that_no_snapshot_has_is_sent_again() -> None:
    def first(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield acknowledgement(conversation.next(), prompt_index=1)
        yield chunk(start, 0, snapshot=b"with the bird")
        yield acknowledgement(conversation.next(), prompt_index=2)

    def second(conversation: Conversation, start: Received) -> Iterator[Any]:
        again = conversation.next()
        assert (again.prompt, again.options.at_latent_frame) == ("a cat", 30)
        yield acknowledgement(again, prompt_index=2)
        yield chunk(start, 1, prompt_index=2, final=True)
        yield acknowledgement(conversation.next())

    script = Sequel(first, second)
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=2) as video:
        assert video.switch_prompt("a bird") == 1
        chunks = video.chunks()
        assert next(chunks).prompt_index == 0
        assert video.switch_prompt("a cat", at_latent_frame=30) == 2
        assert [item.prompt_index for item in chunks] == [2]
    assert script.starts[1].snapshot == b"with the bird"


def test_a_switch_on_a_broken_session_makes_it_go_on() -> None:
    def second(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield acknowledgement(conversation.next(), prompt_index=1)
        yield chunk(start, 1, prompt_index=1, final=True)
        yield acknowledgement(conversation.next())

    with (
        ScriptedTriton(Sequel(breaks_after(0), second)) as server,
        VideoStream("a fox", url=server.url, chunks=2) as video,
    ):
        wait_until(lambda: video._get_connection()._tracker.failure is not None)  # chunk 0 lies there unread
        assert video.switch_prompt("a bird") == 1
        assert numbers(video) == [0, 1]


def test_a_server_that_shuts_down_hands_over() -> None:
    def leaves(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield chunk(start, 0, snapshot=b"old")
        yield chunk(start, 1)
        yield acknowledgement(start, notice="the server is shutting down", snapshot=b"last", final=False)
        yield error(start, "[shutting_down] connect again later")
        while True:
            conversation.next()

    script = Sequel(leaves, ends_after(2))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=3) as video:
        chunks = list(video.chunks())
    assert [item.first_frame for item in chunks if len(item.frames)] == [0, 9, 21]
    assert [item.notice for item in chunks if item.notice] == ["the server is shutting down"]
    assert script.starts[1].snapshot == b"last"


def test_silence_makes_it_go_on_elsewhere() -> None:
    def falls_silent(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield chunk(start, 0, snapshot=b"s")
        conversation.gone.wait()

    with (
        ScriptedTriton(Sequel(falls_silent, *[ends_after(1)] * 100)) as server,  # one may be slow to answer as well
        VideoStream("a fox", url=server.url, chunks=2, stall_timeout=0.3) as video,
    ):
        assert numbers(video) == [0, 1]


def test_a_session_that_waited_for_its_first_frame_begins_again() -> None:
    def waits(conversation: Conversation, start: Received) -> Iterator[Any]:
        yield acknowledgement(start, notice="waiting for a slot: place 1 of 1", final=False)

    script = Sequel(waits, ends_after(0, 1))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=2, seed=4) as video:
        assert numbers(video) == [0, 1]
    assert script.starts[1].prompt == "a fox"
    assert script.starts[1].tensors["SEED"].tolist() == [4]


def test_a_full_server_is_asked_again_while_it_goes_on() -> None:
    script = Sequel(breaks_after(0), full, full, ends_after(1))
    with ScriptedTriton(script) as server, VideoStream("a fox", url=server.url, chunks=2, max_attempts=1) as video:
        assert numbers(video) == [0, 1]
    assert {start.options.max_wait_s for start in script.starts} == {None}


def test_it_gives_up_in_time_with_the_last_error(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = itertools.count(step=10)
    monkeypatch.setattr(
        retry_policy, "time", SimpleNamespace(monotonic=lambda: next(looks))
    )  # every attempt takes 10 s
    with (
        ScriptedTriton(Sequel(breaks_after(0))) as server,
        VideoStream("a fox", url=server.url, chunks=2, resume_for=25.0) as video,
    ):
        chunks = video.chunks()
        assert len(next(chunks).frames)
        server.kill()
        with pytest.raises(errors.ConnectionLostError):
            next(chunks)
    assert next(looks) == 40  # it broke at 0; after 10 and 20 s there was time left, after 30 s there was none


def test_what_never_answered_is_not_asked_again() -> None:
    script = Sequel(breaks_after(), ends_after(0))
    with (
        ScriptedTriton(script) as server,
        pytest.raises(errors.ConnectionLostError),
        VideoStream("a fox", url=server.url, chunks=1) as video,
    ):
        numbers(video)
    assert len(script.starts) == 1


def test_cancel_ends_the_attempts() -> None:
    with ScriptedTriton(Sequel(breaks_after(0))) as server, VideoStream("a fox", url=server.url, chunks=2) as video:
        chunks = video.chunks()
        next(chunks)
        server.kill()
        timer = threading.Timer(0.5, video.cancel)
        timer.start()
        assert list(chunks) == []
        timer.join()


def test_a_video_that_is_complete_needs_no_connection() -> None:
    seen: list[Received] = []
    with (
        ScriptedTriton(recorded(Sequel(breaks_after(0, 1)), seen)) as server,
        VideoStream("a fox", url=server.url, chunks=2) as video,
    ):
        assert numbers(video) == [0, 1]
    assert sum(request.start for request in seen) == 1
