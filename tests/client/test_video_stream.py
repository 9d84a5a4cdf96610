# SPDX-License-Identifier: Apache-2.0
"""VideoStream and AsyncVideoStream against a scripted server over real gRPC. Every test runs with both."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from longlive_client import errors
from longlive_client.connection import AHEAD, CONFIRM_EVERY
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.session_options import Options
from tests.fakes.scripted_triton import (
    Conversation,
    Received,
    ScriptedTriton,
    acknowledgement,
    chunk,
    error,
    final,
    recorded,
    well_behaved,
)
from tests.support.both_streams import Open, indices


def test_chunks_come_in_order_and_end_with_the_final_response(stream: Open) -> None:
    with ScriptedTriton(well_behaved) as server, stream("a fox", url=server.url, chunks=4) as video:
        chunks = list(video.chunks())
    assert [len(item.frames) for item in chunks] == [9, 12, 12, 12]
    assert [item.first_frame for item in chunks] == [0, 9, 21, 33]
    assert chunks[0].arrived <= chunks[-1].arrived <= time.monotonic()


def test_a_final_flag_on_the_last_chunk_itself_ends_it_too(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        yield chunk(start, 0)
        yield chunk(start, 1, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=2) as video:
        assert indices(video) == [0, 1]


def test_frames_are_single_pictures(stream: Open) -> None:
    with ScriptedTriton(well_behaved) as server, stream("a fox", url=server.url, chunks=2) as video:
        frames = list(video.frames())
    assert len(frames) == 21
    assert frames[0].shape == (4, 6, 3)
    assert frames[0].dtype == np.uint8


def test_the_start_says_what_was_asked_for_and_closing_says_end(stream: Open) -> None:
    seen: list[Received] = []
    with (
        ScriptedTriton(recorded(well_behaved, seen)) as server,
        stream("ein Fuchs läuft", url=server.url, chunks=1, seed=5, global_sink=False) as video,
    ):
        list(video.chunks())
    start, end = seen
    assert (start.start, start.end, start.empty_final) == (True, False, True)
    assert (start.prompt, start.chunks, start.tensors["SEED"].tolist()) == ("ein Fuchs läuft", 1, [5])
    assert start.options.global_sink is False
    assert (end.start, end.end, end.options) == (False, True, Options(session_token=video.session_token))
    assert start.session_id == end.session_id == video.session_id
    assert len(bytes.fromhex(video.session_id)) == 16


def test_without_a_number_of_chunks_it_goes_on_until_it_is_closed(stream: Open) -> None:
    """In small requests: Triton keeps what it has sent until all of a request is answered."""
    seen: list[Received] = []
    with ScriptedTriton(recorded(well_behaved, seen)) as server, stream("a fox", url=server.url) as video:
        for number, _ in enumerate(video.chunks()):
            if number == 50:
                break
    assert seen[-1].end
    asked = [request.chunks or 0 for request in seen[:-1]]
    assert max(asked) == asked[0] == AHEAD
    assert 50 < sum(asked) <= 51 + AHEAD


def test_what_was_read_of_a_large_request_is_confirmed_now_and_then(stream: Open) -> None:
    seen: list[Received] = []

    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for index in range(20):
            yield chunk(start, index)
        while not (request := conversation.next()).end:
            yield acknowledgement(request)
        yield final(start)
        yield acknowledgement(request)

    with (
        ScriptedTriton(recorded(script, seen)) as server,
        stream("a fox", url=server.url, chunks=21, ahead=21) as video,
    ):
        for number, _ in enumerate(video.chunks()):
            if number == 19:
                break
    assert seen[0].chunks == 21
    assert [request.prompt or request.chunks for request in seen[1:-1]] == [None] * (19 // CONFIRM_EVERY)


def test_a_switch_returns_the_index_that_the_server_gave(stream: Open) -> None:
    seen: list[Received] = []
    with (
        ScriptedTriton(recorded(well_behaved, seen)) as server,
        stream("a fox", url=server.url, chunks=1) as video,
    ):
        assert video.switch_prompt("a bear") == 1
        assert video.switch_prompt("a hare", at_latent_frame=40) == 2
        video.request_chunks(2)
        assert [item.prompt_index for item in video.chunks()] == [0, 1, 1]
    assert [request.prompt for request in seen[1:3]] == ["a bear", "a hare"]
    assert [request.options.at_latent_frame for request in seen[1:3]] == [None, 40]


def test_a_switch_does_not_wait_for_chunks_to_be_consumed(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        update = conversation.next()
        for index in range(100):
            yield chunk(start, index)
        yield acknowledgement(update, prompt_index=1)
        yield final(start)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=100) as video:
        assert video.switch_prompt("a bear") == 1
        assert indices(video) == list(range(100))


def test_a_wrong_prompt_is_refused_before_it_is_sent_and_the_stream_goes_on(stream: Open) -> None:
    seen: list[Received] = []
    with ScriptedTriton(recorded(well_behaved, seen)) as server, stream("a fox", url=server.url, chunks=2) as video:
        for prompt in (" ", "\ud800"):
            with pytest.raises(errors.InvalidRequestError):
                video.switch_prompt(prompt)
        assert indices(video) == [0, 1]
    assert len(seen) == 2


def test_a_prompt_that_the_server_refuses_raises_there_and_the_stream_goes_on(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start, update = conversation.next(), conversation.next()
        assert update.prompt == ""
        yield chunk(start, 0)
        yield error(update, "[invalid_request] PROMPT: got an empty prompt")
        yield final(update)
        yield chunk(start, 1, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=2, check=False) as video:
        with pytest.raises(errors.InvalidRequestError, match="got an empty prompt"):
            video.switch_prompt("")
        assert indices(video) == [0, 1]


def test_an_empty_first_prompt_needs_no_server_to_be_refused(stream: Open) -> None:
    with pytest.raises(errors.InvalidRequestError), stream("", url="127.0.0.1:1"):
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[invalid_request] a", errors.InvalidRequestError),
        ("[session_exists] a", errors.SessionExistsError),
        ("[frame_limit] a", errors.FrameLimitError),
        ("[cancelled] a", errors.SessionCancelledError),
        ("[shutting_down] a", errors.ServerShutdownError),
        ("[internal] a", errors.ServerFailedError),
        ("Failed to process the request(s), message: ValueError: [frame_limit] a", errors.FrameLimitError),
        ("[request id: 1] inference request for x must specify the START flag", errors.UnknownSessionError),
        ("Request for unknown model: 'longlive' is not found", errors.ServerFailedError),
    ],
)
def test_an_error_has_the_class_of_its_kind_and_comes_after_the_chunks_before_it(
    stream: Open, text: str, expected: type[RequestError]
) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        yield chunk(start, 0)
        yield error(start, text)
        yield final(start)

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=3) as video:
        chunks = video.chunks()
        assert len(next(chunks).frames) == 9
        with pytest.raises(expected) as caught:
            next(chunks)
        assert type(caught.value) is expected
        with pytest.raises(expected):  # the session is over, for updates too
            video.switch_prompt("a bear")


@pytest.mark.parametrize(("kind", "ended"), [("frame_limit", True), ("session_exists", False)])
def test_a_failed_session_is_ended_too_but_not_that_of_somebody_else(stream: Open, kind: str, ended: bool) -> None:
    seen: list[Received] = []

    def script(conversation: Conversation) -> Iterator[Any]:
        yield error(conversation.next(), f"[{kind}] no")
        yield error(conversation.next(), "[unknown_session] it has ended")
        conversation.gone.wait()

    with ScriptedTriton(recorded(script, seen)) as server:
        video = stream("a fox", url=server.url)
        with pytest.raises(RequestError, match="no"), video:
            indices(video)
    assert [request.end for request in seen] == ([False, True] if ended else [False])


def test_more_chunks_continue_the_iteration(stream: Open) -> None:
    with ScriptedTriton(well_behaved) as server, stream("a fox", url=server.url, chunks=2) as video:
        seen = []
        for item in video.chunks():
            seen.append(int(item.frames[0, 0, 0, 0]))
            if len(seen) == 1:
                video.request_chunks(1)
        assert seen == [0, 1, 2]
        video.request_chunks(2)
        assert indices(video) == [3, 4]
        assert indices(video) == []


def test_a_refused_request_for_chunks_raises_once_and_the_session_lives(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0, final=True)
        yield error(conversation.next(), "[invalid_request] CHUNKS: too many")
        yield chunk(conversation.next(), 1, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=1) as video:
        assert indices(video) == [0]
        video.request_chunks(7)
        with pytest.raises(errors.InvalidRequestError):
            indices(video)
        video.request_chunks(1)
        assert indices(video) == [1]
        with pytest.raises(errors.InvalidRequestError):
            video.request_chunks(0)


@pytest.mark.parametrize("chunks", [7, None])
def test_no_more_chunks_than_ahead_are_asked_for_before_they_are_consumed(stream: Open, chunks: int | None) -> None:
    seen: list[Received] = []
    script = recorded(well_behaved, seen)
    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=chunks, ahead=3) as video:
        for number, item in enumerate(video.chunks()):
            assert item.frames[0, 0, 0, 0] == number
            assert sum(request.chunks or 0 for request in seen) <= number + 3
            if number == 6 and chunks is None:
                break
        assert [request.chunks for request in seen[:5]] == [3, 1, 1, 1, 1]
