# SPDX-License-Identifier: Apache-2.0
"""The open requests of one connection. Matches responses to them by request id.

Used by `connection.py`. No I/O: `add` returns the message to send, `receive` takes a response.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from longlive_client import wire
from longlive_client.errors import (
    InvalidRequestError,
    RateLimitedError,
    ServerFailedError,
    UnknownSessionError,
    VideoStreamError,
)
from longlive_client.resume_state import ResumeState
from longlive_client.wire import StreamedChunk
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import Request
from longlive_serve.protocol.session_options import RAW


@dataclasses.dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request that was sent, and its responses so far."""

    start: bool
    remaining: int
    """Chunks still to come."""
    is_streaming: bool
    """It is answered by chunks; otherwise by one acknowledgement."""
    has_response: bool = False
    acknowledgement: StreamedChunk | None = None
    error: VideoStreamError | None = None
    closed: bool = False

    def close(self, error: VideoStreamError | None = None) -> None:
        self.error = error
        self.closed = True


class RequestTracker:
    """The requests of one connection. Chunks are added to the session's `state`."""

    def __init__(self, state: ResumeState, frame_format: str, *, check: bool) -> None:
        self.failure: VideoStreamError | None = None
        """Why the session ended; None while it is live."""
        self.num_chunks = 0
        """Chunks received so far."""
        self.is_closed = False
        """Drop chunks that arrive from now on."""
        self._state = state
        self._check = check
        self._decoder = None
        if frame_format != RAW:
            from longlive_client.frame_decoder import Decoder  # needs PyAV

            self._decoder = Decoder(frame_format)
        self._open: dict[str, OpenRequest] = {}
        self._num_sent = 0

    @property
    def is_streaming(self) -> bool:
        return any(request.is_streaming for request in self._open.values())

    @property
    def is_idle(self) -> bool:
        return not self._open

    @property
    def num_requested(self) -> int:
        """Chunks requested here that have not arrived."""
        return sum(request.remaining for request in self._open.values())

    def add(self, request: Request) -> tuple[OpenRequest, Any]:
        """Register `request`. Returns it as an open request, and its message. Raises InvalidRequestError."""
        try:
            tensors = request.to_tensors()
            if self._check:
                Request.from_tensors(request.session_id, request.start, request.end, tensors)
        except RequestError as error:
            raise VideoStreamError.of(error) from None
        except (UnicodeEncodeError, OverflowError) as error:  # the text or number does not fit its tensor
            raise InvalidRequestError(RequestError.INVALID_REQUEST, f"request: cannot be sent ({error})") from None
        self._num_sent += 1
        request_id, chunks = str(self._num_sent), request.chunks or 0
        open_request = OpenRequest(start=request.start, remaining=chunks, is_streaming=chunks > 0)
        self._open[request_id] = open_request
        message = wire.infer_request(request.session_id, request_id, tensors, start=request.start, end=request.end)
        return open_request, message

    def receive(self, response: Any) -> None:
        """Process one ModelStreamInferResponse."""
        request_id = response.infer_response.id
        request = self._open.get(request_id)
        if request is None:
            return  # the empty final response after an error
        if response.error_message:
            self._on_error(request_id, VideoStreamError.of(RequestError.parse(response.error_message)))
            return
        try:
            chunk = wire.read_chunk(response)
            if chunk is not None and chunk.encoded and self._decoder is not None:
                chunk = self._decoder.decode(chunk)
        except (ValueError, IndexError) as error:
            self.fail(ServerFailedError(RequestError.INTERNAL, f"the response cannot be read: {error}"))
            return
        if chunk is not None:
            self._on_chunk(request, chunk)
        if wire.is_final(response):
            del self._open[request_id]
            request.close()

    def fail(self, error: VideoStreamError) -> None:
        """End the session with `error` and close all requests. Later calls do not change `failure`."""
        if self.failure is None:
            self.failure = error
        for request in self._open.values():
            request.close(self.failure)
        self._open.clear()

    def _on_chunk(self, request: OpenRequest, chunk: StreamedChunk) -> None:
        request.has_response = True
        if chunk.completes:
            self.num_chunks += 1
            request.remaining = max(0, request.remaining - 1)
        elif not request.is_streaming:
            request.acknowledgement = chunk
        if (len(chunk.frames) > 0 or chunk.notice) and not self.is_closed:
            self._state.add(chunk)

    def _on_error(self, request_id: str, error: VideoStreamError) -> None:
        request = self._open[request_id]
        fatal = request.start or isinstance(error, UnknownSessionError)
        if fatal or (request.is_streaming and not isinstance(error, InvalidRequestError | RateLimitedError)):
            self.fail(error)
            return
        del self._open[request_id]
        request.close(error)
        if request.is_streaming:
            self._state.remaining -= request.remaining
            self._state.queue.append(error)
