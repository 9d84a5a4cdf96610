# SPDX-License-Identifier: Apache-2.0
"""VideoStream and AsyncVideoStream with one interface, so that every test runs with both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np

from longlive_client.video_stream import AsyncVideoStream, StreamedChunk, VideoStream


class BlockingAsyncVideoStream:
    """AsyncVideoStream with the interface of VideoStream, in its own event loop."""

    def __init__(self, prompt: str, **settings: Any) -> None:
        self._stream = AsyncVideoStream(prompt, **settings)
        self._runner = asyncio.Runner()
        self.session_token, self.cancel = self._stream.session_token, self._stream.cancel

    @property
    def session_id(self) -> str:
        return self._stream.session_id

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


def indices(video: VideoStream) -> list[int]:
    return [int(item.frames[0, 0, 0, 0]) for item in video.chunks()]
