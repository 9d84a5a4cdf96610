# SPDX-License-Identifier: Apache-2.0
"""The bookkeeping of one session's stream: which requests are open, what is owed on them, what has arrived.

Used by `connection.py`. Knows neither connections nor time limits: messages go out of `ask` and into `receive`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from longlive_client import wire
from longlive_client.errors import (
    InvalidRequestError,
    RateLimitedError,
    ServerFailedError,
    UnknownSessionError,
    VideoStreamError,
)
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk, Request
from longlive_serve.protocol.session_options import RAW

if TYPE_CHECKING:
    from longlive_client.frame_decoder import Decoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedChunk(FrameChunk):
    """A chunk (with `stream_partial_chunks`, a part of one) as the client got it. One without frames carries only a
    notice."""

    arrived: float  # time.monotonic() when it came off the wire


@dataclasses.dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request that was sent, and what has come back for it."""

    start: bool
    due: float  # chunks still to come; math.inf: until stopped
    streams: bool  # answered by chunks; else by one acknowledgement
    answered: bool = False  # something has come back for it
    acknowledgement: StreamedChunk | None = None
    error: VideoStreamError | None = None
    closed: bool = False

    def close(self, error: VideoStreamError | None = None) -> None:
        self.error = error
        self.closed = True


class Exchange:
    """The requests of one session and the responses to them, matched by request id."""

    def __init__(self, session_id: str, *, check: bool, frame_format: str = RAW) -> None:
        self.received: deque[StreamedChunk | VideoStreamError] = deque()
        """In order; an error stands where the chunks it refused would have come."""
        self.failure: VideoStreamError | None = None
        """Why the session is over, once it is."""
        self.cut_short = False
        """Whether chunks were still owed when it failed."""
        self.chunks = 0
        """Chunks received so far."""
        self._session_id = session_id
        self._check = check
        self._decoder = None if frame_format == RAW else _decoder(frame_format)
        self._open: dict[str, OpenRequest] = {}
        self._sent = 0

    @property
    def streaming(self) -> bool:
        return any(request.streams for request in self._open.values())

    @property
    def quiet(self) -> bool:
        return not self._open

    @property
    def outstanding(self) -> float:
        """Chunks asked for and not yet taken out of `received`."""
        waiting = sum(isinstance(item, StreamedChunk) and item.completes for item in self.received)
        return waiting + sum(request.due for request in self._open.values())

    def ask(self, request: Request) -> tuple[OpenRequest, Any]:
        """`request` as an open request and the message that carries it. Raises InvalidRequestError."""
        try:
            tensors = request.to_tensors()
            if self._check:
                Request.from_tensors(request.session_id, request.start, request.end, tensors)
        except RequestError as error:
            raise VideoStreamError.of(error) from None
        except (UnicodeEncodeError, OverflowError) as error:  # the text or number does not fit its tensor
            raise InvalidRequestError(RequestError.INVALID_REQUEST, f"request: cannot be sent ({error})") from None
        self._sent += 1
        due = request.chunks or (math.inf if request.start else 0)
        opened = OpenRequest(start=request.start, due=due, streams=due > 0)
        request_id = str(self._sent)
        self._open[request_id] = opened
        message = wire.infer_request(request.session_id, request_id, tensors, start=request.start, end=request.end)
        return opened, message

    def receive(self, response: Any) -> None:
        """Take in one ModelStreamInferResponse."""
        request_id = response.infer_response.id
        request = self._open.get(request_id)
        if request is None:
            return  # the empty final response after an error
        if response.error_message:
            self._refuse(request_id, VideoStreamError.of(RequestError.parse(response.error_message)))
            return
        try:
            chunk = wire.frame_chunk(response)
            if chunk is not None and chunk.encoded and self._decoder is not None:
                chunk = self._decoder.decode(chunk)
        except (ValueError, IndexError) as error:
            self.fail(ServerFailedError(RequestError.INTERNAL, f"the response cannot be read: {error}"))
            return
        if chunk is not None:
            self._take(request, chunk)
        if wire.is_final(response):
            del self._open[request_id]
            request.close()

    def fail(self, error: VideoStreamError) -> None:
        """The session is over: nothing more will come. The first call counts."""
        if self.failure is None:
            self.failure = error
            self.cut_short = self.streaming
        for request in self._open.values():
            request.close(self.failure)
        self._open.clear()

    def _take(self, request: OpenRequest, chunk: FrameChunk) -> None:
        streamed = StreamedChunk(**vars(chunk), arrived=time.monotonic())
        request.answered = True
        if chunk.completes:
            self.chunks += 1
            request.due = max(0, request.due - 1)
        elif not request.streams:
            request.acknowledgement = streamed
        if len(chunk.frames) > 0 or chunk.notice:
            self.received.append(streamed)

    def _refuse(self, request_id: str, error: VideoStreamError) -> None:
        request = self._open[request_id]
        gone = request.start or isinstance(error, UnknownSessionError)
        if gone or (request.streams and not isinstance(error, InvalidRequestError | RateLimitedError)):
            self.fail(error)
            return
        del self._open[request_id]
        request.close(error)
        if request.streams:
            self.received.append(error)


def _decoder(frame_format: str) -> Decoder:
    from longlive_client.frame_decoder import Decoder  # PyAV, for those who want it

    return Decoder(frame_format)
