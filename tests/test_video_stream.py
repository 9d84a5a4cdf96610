# SPDX-License-Identifier: Apache-2.0
"""VideoStream and AsyncVideoStream against a scripted server over real gRPC. Every test runs with both."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from client import errors
from client.connection import CONFIRM_EVERY
from client.video_stream import AsyncVideoStream, StreamedChunk, VideoStream
from longlive_serve.protocol import Options, ServeError
from tests.scripted_triton import (
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


class BlockingAsyncVideoStream:
    """AsyncVideoStream with the face of VideoStream, in an event loop of its own."""

    def __init__(self, prompt: str, **settings: Any) -> None:
        self._stream = AsyncVideoStream(prompt, **settings)
        self._runner = asyncio.Runner()
        self.session_id, self.token = self._stream.session_id, self._stream.token
        self.cancel = self._stream.cancel

    def __enter__(self) -> Self:
        self._runner.run(self._stream.__aenter__())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._runner.run(self._stream.__aexit__(kind, error, tb))
        self._runner.close()

    def chunks(self) -> Iterator[StreamedChunk]:
        yield from self._all(self._stream.chunks())

    def frames(self) -> Iterator[np.ndarray[Any, Any]]:
        yield from self._all(self._stream.frames())

    def switch_prompt(self, text: str, *, at_latent_frame: int | None = None) -> int:
        return self._runner.run(self._stream.switch_prompt(text, at_latent_frame=at_latent_frame))

    def request_chunks(self, count: int) -> None:
        self._runner.run(self._stream.request_chunks(count))

    def _all(self, items: Any) -> Iterator[Any]:
        async def next_item() -> Any:
            return await anext(items, None)

        while (item := self._runner.run(next_item())) is not None:
            yield item


Open = Callable[..., VideoStream]


@pytest.fixture(params=[VideoStream, BlockingAsyncVideoStream], ids=["sync", "async"])
def stream(request: pytest.FixtureRequest) -> Open:
    """Streams that raise when their connection breaks; how they go on instead is in test_resumable.py."""

    def opened(prompt: str, **settings: Any) -> VideoStream:
        return request.param(prompt, **({"resume_for": 0.0} | settings))  # type: ignore[no-any-return]

    return opened


def indices(video: VideoStream) -> list[int]:
    return [int(item.frames[0, 0, 0, 0]) for item in video.chunks()]


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
    assert (end.start, end.end, end.options) == (False, True, Options(token=video.token))
    assert start.session_id == end.session_id == video.session_id
    assert len(bytes.fromhex(video.session_id)) == 16


def test_without_a_number_of_chunks_it_goes_on_until_it_is_closed(stream: Open) -> None:
    seen: list[Received] = []

    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for index in range(21):
            yield chunk(start, index)
        while not (request := conversation.next()).end:
            yield acknowledgement(request)
        yield final(start)
        yield acknowledgement(request)

    with ScriptedTriton(recorded(script, seen)) as server, stream("a fox", url=server.url) as video:
        for number, _ in enumerate(video.chunks()):
            if number == 20:
                break
    assert seen[0].chunks is None
    assert seen[-1].end
    # What was read is confirmed now and then.
    assert [request.prompt or request.chunks for request in seen[1:-1]] == [None] * (20 // CONFIRM_EVERY)


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
    stream: Open, text: str, expected: type[ServeError]
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
        conversation.gone.wait(10)

    with ScriptedTriton(recorded(script, seen)) as server:
        video = stream("a fox", url=server.url)
        with pytest.raises(ServeError, match="no"), video:
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


def test_silence_while_chunks_are_due_is_a_stall(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait(10)

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=2, stall_timeout=0.3)
        with pytest.raises(errors.StallError, match=r"no response for 0\.3 s"), video:
            indices(video)


def test_silence_after_a_switch_is_a_stall(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0, final=True)
        conversation.gone.wait(10)

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1, stall_timeout=0.3)
        with pytest.raises(errors.StallError), video:
            video.switch_prompt("a bear")


def test_a_server_that_answers_heartbeats_may_take_its_time(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for _ in range(4):
            heartbeat = conversation.next()
            assert list(heartbeat.tensors) == ["OPTIONS"]
            yield acknowledgement(heartbeat)
        yield chunk(start, 0, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server:
        since = time.monotonic()
        with stream("a fox", url=server.url, chunks=1, stall_timeout=0.3) as video:
            assert indices(video) == [0]
        assert time.monotonic() - since > 0.5


def test_heartbeats_are_sent_while_nothing_else_is(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for _ in range(3):
            heartbeat = conversation.next()
            assert heartbeat.options == Options(token=start.options.token)
            assert not (heartbeat.prompt)
            assert not (heartbeat.chunks)
            assert not (heartbeat.start)
            assert not (heartbeat.end)
            assert heartbeat.session_id == start.session_id
            yield acknowledgement(heartbeat)
        yield chunk(start, 0, final=True)

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=1, heartbeat_s=0.05) as video:
        assert indices(video) == [0]


def test_a_server_that_is_not_there_is_named(stream: Open) -> None:
    def watch() -> None:
        with stream("a fox", url="127.0.0.1:1", chunks=1) as video:
            indices(video)

    with pytest.raises(errors.ConnectionLostError, match=r"127\.0\.0\.1:1: cannot be reached .* check that"):
        watch()


def test_a_broken_stream_raises_after_the_chunks_that_came(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait(10)

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=5) as video:
        chunks = video.chunks()
        next(chunks)
        server.kill()
        with pytest.raises(errors.ConnectionLostError, match="the stream broke after 1 chunks"):
            next(chunks)
        with pytest.raises(errors.ConnectionLostError):
            video.switch_prompt("a bear")


def test_a_stream_that_the_server_closes_early_is_lost(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=5)
        with pytest.raises(errors.ConnectionLostError, match="the server closed it"), video:
            indices(video)


def test_a_connection_lost_after_the_last_chunk_costs_nothing(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        yield chunk(start, 0)
        yield chunk(start, 1, final=True)

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=2) as video:
        assert indices(video) == [0, 1]
        with pytest.raises(errors.ConnectionLostError):
            video.switch_prompt("a bear")
        with pytest.raises(errors.ConnectionLostError):
            video.request_chunks(1)


def test_cancel_from_another_thread_ends_the_iteration_and_tells_the_server(stream: Open) -> None:
    gone = threading.Event()

    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        if conversation.gone.wait(10):
            gone.set()

    with ScriptedTriton(script) as server, stream("a fox", url=server.url) as video:
        chunks = video.chunks()
        next(chunks)
        threading.Timer(0.1, video.cancel).start()
        assert list(chunks) == []
        assert gone.wait(5)
        with pytest.raises(errors.SessionCancelledError):
            video.switch_prompt("a bear")


def test_cancel_frees_a_caller_that_waits_for_a_switch(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait(10)

    with ScriptedTriton(script) as server, stream("a fox", url=server.url) as video:
        threading.Timer(0.1, video.cancel).start()
        with pytest.raises(errors.SessionCancelledError):
            video.switch_prompt("a bear")


def test_a_stream_cancelled_before_it_opens_does_not_open(stream: Open) -> None:
    with ScriptedTriton(well_behaved) as server:
        video = stream("a fox", url=server.url)
        video.cancel()
        with pytest.raises(errors.SessionCancelledError), video:
            pass


def test_notices_are_handed_on(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        yield acknowledgement(start, notice="1 session is before yours", final=False)
        yield chunk(start, 0, notice="the prompt was shortened")
        yield acknowledgement(conversation.next(), prompt_index=1, notice="this one too")
        yield chunk(start, 1, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server, stream("a fox", url=server.url, chunks=2) as video:
        assert video.switch_prompt("a bear") == 1
        chunks = list(video.chunks())
    assert [item.notice for item in chunks] == [
        "1 session is before yours",
        "the prompt was shortened",
        "this one too",
        "",
    ]
    assert [len(item.frames) for item in chunks] == [0, 9, 0, 12]


def test_a_response_that_cannot_be_read_fails_the_stream(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        response = chunk(conversation.next(), 0)
        del response.infer_response.outputs[1:], response.infer_response.raw_output_contents[1:]
        yield response
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1)
        with pytest.raises(errors.ServerFailedError, match="expected also"), video:
            indices(video)


def test_a_close_that_the_server_ignores_does_not_hang(stream: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.connection.CLOSE_TIMEOUT_S", 0.2)

    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait(10)

    with ScriptedTriton(script) as server:
        with stream("a fox", url=server.url) as video:
            next(video.chunks())
            since = time.monotonic()
        assert time.monotonic() - since < 2


def test_misuse_is_told_apart_from_failure(stream: Open) -> None:
    for settings in ({"chunks": 0}, {"ahead": 0}, {"chunks": 2**31}):
        with pytest.raises(errors.InvalidRequestError, match="expected 1 to 2147483647"):
            stream("a fox", **settings)
    with pytest.raises(errors.InvalidRequestError, match="too large"), stream("a fox", seed=2**63):
        pass
    with ScriptedTriton(well_behaved) as server:
        video = stream("a fox", url=server.url, chunks=1)
        with video:
            with pytest.raises(RuntimeError, match="opened once"):
                video.__enter__()
            assert indices(video) == [0]


def test_a_stream_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        VideoStream("a fox").switch_prompt("a bear")
    with pytest.raises(RuntimeError, match="not open"):
        next(VideoStream("a fox").chunks())


def test_many_synchronous_streams_run_beside_each_other() -> None:
    results: list[list[int]] = []

    def watch(url: str) -> None:
        with VideoStream("a fox", url=url, chunks=20) as video:
            results.append(indices(video))

    with ScriptedTriton(well_behaved) as server:
        threads = [threading.Thread(target=watch, args=(server.url,)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert results == [list(range(20))] * 6
