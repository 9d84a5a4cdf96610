# SPDX-License-Identifier: Apache-2.0
"""Streams that stall, break, are cancelled or closed, against a scripted server. Every test runs with both kinds."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from longlive_client import errors
from longlive_client.video_stream import AsyncVideoStream, VideoStream
from longlive_serve.protocol.session_options import Options
from tests.fakes.scripted_triton import Conversation, ScriptedTriton, acknowledgement, chunk, well_behaved
from tests.fakes.service_bench import LIMIT_S
from tests.support.both_streams import Open, indices


def test_silence_while_chunks_are_due_is_a_stall(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait()

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=2, stall_timeout=0.3)
        with pytest.raises(errors.StallError, match=r"no response for 0\.3 s"), video:
            indices(video)


def test_silence_after_a_switch_is_a_stall(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0, final=True)
        conversation.gone.wait()

    with ScriptedTriton(script) as server:
        video = stream("a fox", url=server.url, chunks=1, stall_timeout=0.3)
        with pytest.raises(errors.StallError), video:
            video.switch_prompt("a bear")


def test_a_server_that_answers_heartbeats_may_take_its_time(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for _ in range(3):
            heartbeat = conversation.next()
            assert list(heartbeat.tensors) == ["OPTIONS"]
            yield acknowledgement(heartbeat)
        yield chunk(start, 0, final=True)
        yield acknowledgement(conversation.next())

    with ScriptedTriton(script) as server:
        since = time.monotonic()
        with stream("a fox", url=server.url, chunks=1, stall_timeout=4) as video:  # the server has 2 s for each answer
            assert indices(video) == [0]
        assert time.monotonic() - since > 4


def test_heartbeats_are_sent_while_nothing_else_is(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        for _ in range(3):
            heartbeat = conversation.next()
            assert heartbeat.options == Options(session_token=start.options.session_token)
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
        conversation.gone.wait()

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
        conversation.gone.wait()
        gone.set()

    with ScriptedTriton(script) as server, stream("a fox", url=server.url) as video:
        chunks = video.chunks()
        next(chunks)
        threading.Timer(0.1, video.cancel).start()
        assert list(chunks) == []
        assert gone.wait(LIMIT_S)
        with pytest.raises(errors.SessionCancelledError):
            video.switch_prompt("a bear")


def test_cancel_frees_a_caller_that_waits_for_a_switch(stream: Open) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        assert conversation.next().prompt == "a bear"
        video.cancel()
        conversation.gone.wait()

    with (
        ScriptedTriton(script) as server,
        stream("a fox", url=server.url) as video,
        pytest.raises(errors.SessionCancelledError),
    ):
        video.switch_prompt("a bear")


def test_cancel_frees_a_caller_that_waits_for_the_connection(stream: Open) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        video = stream("a fox", url=f"127.0.0.1:{mute.getsockname()[1]}")

        def cancel() -> None:
            connection, _ = mute.accept()
            with connection:
                video.cancel()
                ended.wait()

        caller, ended = threading.Thread(target=cancel), threading.Event()
        caller.start()
        with pytest.raises(errors.SessionCancelledError), video:
            pass
        ended.set()
        caller.join()


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
    monkeypatch.setattr("longlive_client.connection.CLOSE_TIMEOUT_S", 0.2)

    gone = threading.Event()

    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        conversation.gone.wait()
        gone.set()

    with ScriptedTriton(script) as server:
        with stream("a fox", url=server.url) as video:
            next(video.chunks())
        assert gone.wait(LIMIT_S)


def test_misuse_is_told_apart_from_failure(stream: Open) -> None:
    for settings in ({"chunks": 0}, {"ahead": 0}, {"chunks": 2**31}):
        with pytest.raises(errors.InvalidRequestError, match="expected 1 to 2147483647"):
            stream("a fox", **settings)
    with pytest.raises(errors.InvalidRequestError, match="too large"), stream("a fox", seed=2**63):
        pass
    with ScriptedTriton(well_behaved) as server:
        video = stream("a fox", url=server.url, chunks=1)
        with video:
            with pytest.raises(RuntimeError, match="opened only once"):
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
            thread.join()
    assert results == [list(range(20))] * 6


class SlowWrites:
    """A call whose writes begin and wait for `go`."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def write(self, message: Any) -> None:
        self.begun.set()
        await self.go.wait()
        await self._call.write(message)


def test_who_gives_up_while_a_request_is_written_breaks_nothing() -> None:
    async def watch(url: str) -> list[int]:
        async with AsyncVideoStream("a fox", url=url, chunks=1, resume_for=0) as video:
            seen = [received.first_frame async for received in video.chunks()]
            assert video._connection is not None
            slow = video._connection._call = SlowWrites(video._connection._call)
            impatient = asyncio.create_task(video.request_chunks(2))
            await slow.begun.wait()
            impatient.cancel()
            with pytest.raises(asyncio.CancelledError):
                await impatient
            slow.go.set()
            return seen + [received.first_frame async for received in video.chunks()]

    with ScriptedTriton(well_behaved) as server:
        assert len(asyncio.run(watch(server.url))) == 3
