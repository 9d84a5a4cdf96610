# SPDX-License-Identifier: Apache-2.0
"""Streams a video while it is generated, with prompt switches: VideoStream, AsyncVideoStream.

with VideoStream("a red fox runs", url="127.0.0.1:8001", seed=1, chunks=20) as video:
    for chunk in video.chunks():
        show(chunk.frames)
        if viewer_asks:
            video.switch_prompt("the fox sleeps")
"""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from longlive_client.grpc_transport import DEFAULT_URL, Tls
from longlive_client.resume import ResumableStream
from longlive_client.wire import StreamedChunk

__all__ = ["DEFAULT_URL", "AsyncVideoStream", "StreamedChunk", "Tls", "VideoStream"]

T = TypeVar("T")
_loop_lock = threading.Lock()
Frame = np.ndarray[Any, Any]  # uint8 [height, width, RGB], read-only


class VideoStream(ResumableStream):
    """A synchronous video stream. Its methods may be called from several threads.

    After a broken connection the stream resumes with the next frame over another one (`resume_for`).
    Every method raises a VideoStreamError (see `longlive_client.errors`) when the server refuses or the stream breaks.
    """

    def __enter__(self) -> Self:
        _run(self._open())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def chunks(self) -> Iterator[StreamedChunk]:
        """Yields the requested chunks in order. May be called again after `request_chunks`.

        A chunk without frames carries only a notice.
        """
        while (chunk := _run(self._next_chunk())) is not None:
            yield chunk

    def frames(self) -> Iterator[Frame]:
        """The frames of `chunks()`, one by one: uint8 [height, width, RGB], read-only."""
        for chunk in self.chunks():
            yield from chunk.frames

    def switch_prompt(self, text: str, *, at_latent_frame: int | None = None) -> int:
        """Switch to another prompt, at the next chunk or the first one at or after `at_latent_frame`.

        Waits for the server's acknowledgement and returns the prompt's index: the `prompt_index` of its chunks. If the
        prompt is refused, this raises and the stream continues.
        """
        return _run(self._switch_prompt(text, at_latent_frame))

    def request_chunks(self, count: int) -> None:
        """Request `count` more chunks, which continue the iteration. A refusal is raised in the iteration."""
        _run(self._request_chunks(count))

    def close(self) -> None:
        """End the session if it is live. Chunks that were not consumed are dropped."""
        _run(self._close())


class AsyncVideoStream(ResumableStream):
    """VideoStream for asyncio: `async with`, `async for`, `await`. The methods are those of VideoStream."""

    async def __aenter__(self) -> Self:
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close()

    async def chunks(self) -> AsyncIterator[StreamedChunk]:
        while (chunk := await self._next_chunk()) is not None:
            yield chunk

    async def frames(self) -> AsyncIterator[Frame]:
        async for chunk in self.chunks():
            for frame in chunk.frames:
                yield frame

    async def switch_prompt(self, text: str, *, at_latent_frame: int | None = None) -> int:
        return await self._switch_prompt(text, at_latent_frame)

    async def request_chunks(self, count: int) -> None:
        await self._request_chunks(count)

    async def close(self) -> None:
        await self._close()


@functools.cache
def _start_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all synchronous streams, in a thread of its own."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="video-stream", daemon=True).start()
    return loop


def _run(work: Coroutine[Any, Any, T]) -> T:
    with _loop_lock:  # two threads at once must not start two loops
        loop = _start_loop()
    future = asyncio.run_coroutine_threadsafe(work, loop)
    try:
        return future.result()
    except BaseException:  # for example Ctrl-C: the result is not needed
        future.cancel()
        raise
