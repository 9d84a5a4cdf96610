# SPDX-License-Identifier: Apache-2.0
"""A session together with the client behind it: what was asked for, and where the answers go.

Used by the engine core's worker alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hmac
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from longlive_serve.engine.session import MAX_PENDING, Session
from longlive_serve.observability.tracing import Phase, Trace
from longlive_serve.protocol.errors import RequestError, invalid
from longlive_serve.protocol.messages import FrameChunk, Request

RATE_WINDOW_S = 1.0

Encode = Callable[[FrameChunk], FrameChunk]


class ResponseSender(Protocol):
    """Sends the responses to one request. `final` closes it: nothing is sent after that."""

    def send(self, chunk: FrameChunk | None, final: bool) -> None:
        """Send a chunk (or only the end, without one)."""
        ...

    def fail(self, error: RequestError) -> None:
        """Send an error and close."""
        ...

    def is_cancelled(self) -> bool:
        """True when the client has disconnected."""
        ...


class EncodingResponseSender(ResponseSender, Protocol):
    """A sender that encodes in its own thread."""

    def send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None = None) -> None: ...


@dataclasses.dataclass
class ChunkRequest:
    """Chunks that a client asked for with one request, and where they go."""

    sender: EncodingResponseSender
    chunks: int | None
    """Still to send; None: until stopped."""


@dataclasses.dataclass
class ClientStream:
    """A session and the client behind it."""

    session: Session
    chunk_requests: deque[ChunkRequest]
    end_requested: bool
    """True once the client has said END: the session ends with its last request for chunks."""
    arrival_time: float
    """When its START came (monotonic seconds, as all times here)."""
    max_wait_s: float
    """How long it may wait for a slot."""
    snapshot_every: int = 0
    """Chunks from one snapshot to the next; 0: none are sent."""
    stream_partial_chunks: bool = False
    """A chunk's frames go out as soon as each latent frame is decoded."""
    encode: Encode | None = None
    """Frames to the session's format; None: raw."""
    trace: Trace | None = None
    needs_first_frame: bool = True
    switch_times: dict[int, float] = dataclasses.field(default_factory=dict)
    """When the prompts came that are meant for the next chunk, by index."""
    last_activity: float = 0.0
    """When the client last sent a request, or was last sent a chunk."""
    queue_position: int = 0
    """The place in the queue that the client was last told; 0: none."""
    unacked: int = 0
    """Chunks sent since the client's last request: for all that is known, it has not read them."""
    request_times: deque[float] = dataclasses.field(default_factory=deque)
    """When its requests of the last second came."""

    def __post_init__(self) -> None:
        self.last_activity = self.arrival_time

    @property
    def log_extra(self) -> dict[str, str]:
        """What a log record about this session carries."""
        return {"session": self.session.id}

    def trace_chunk(self, chunk: FrameChunk, phases: Sequence[Phase]) -> None:
        """Write a chunk into the session's trace, if it has one."""
        if self.trace is not None:
            metadata = {"first_frame": chunk.first_frame, "prompt_index": chunk.prompt_index}
            end = phases[-1].start_time + phases[-1].seconds if phases else time.monotonic()
            name = f"chunk {self.session.next_chunk - 1}"
            self.trace.add(
                Phase(name=name, start_time=end - chunk.seconds, seconds=chunk.seconds), "chunks", **metadata
            )
            for phase in phases:
                self.trace.add(phase, "phases")

    def check(self, request: Request, max_per_s: int) -> None:
        """Raises RequestError when `request`, a later one of this session, must not be taken."""
        expected, token = self.session.token, request.options.session_token or ""
        if expected and not hmac.compare_digest(expected.encode(), token.encode()):
            text = f"OPTIONS.session_token: got {'another' if token else 'none'}, expected the one that START carried"
            raise RequestError(RequestError.FORBIDDEN, f"session {self.session.id}: {text}")
        now = time.monotonic()
        while self.request_times and now - self.request_times[0] > RATE_WINDOW_S:
            self.request_times.popleft()
        if len(self.request_times) >= max_per_s:
            text = f"got more than {max_per_s} requests in a second; wait {RATE_WINDOW_S:g} s"
            raise RequestError(RequestError.RATE_LIMITED, f"session {self.session.id}: {text}")
        self.request_times.append(now)
        for value, pending, message in (
            (request.prompt, self.session.pending, "PROMPT: got one while {} others wait for their time"),
            (request.chunks, self.chunk_requests, "CHUNKS: got some while {} requests for chunks are open"),
        ):
            if value is not None and len(pending) >= MAX_PENDING:
                text = f"{message.format(len(pending))}, expected fewer than {MAX_PENDING}"
                raise invalid(text)

    def record_request(self) -> None:
        """A request arrived: the client has read what it was sent."""
        self.last_activity, self.unacked = time.monotonic(), 0

    @property
    def needs_snapshot(self) -> bool:
        """Whether the chunk just generated goes out with a snapshot."""
        return bool(self.snapshot_every) and self.session.next_chunk % self.snapshot_every == 0

    @property
    def is_cancelled(self) -> bool:
        """True when the client has left an answer unheard."""
        return any(chunk_request.sender.is_cancelled() for chunk_request in self.chunk_requests)

    def send_chunk(self, chunk: FrameChunk, snapshot: Callable[[], bytes] | None = None) -> None:
        """Send a chunk (or a part of it) as an answer to the oldest request for chunks, and close that with its
        last one.

        `snapshot` makes the one that goes with it, in the thread that sends.
        """
        chunk_request = self.chunk_requests[0]
        if chunk.completes and chunk_request.chunks is not None:
            chunk_request.chunks -= 1
        self.unacked += chunk.completes
        encode = self.encode if snapshot is None else functools.partial(_with_snapshot, snapshot, self.encode)
        chunk_request.sender.send(chunk, chunk_request.chunks == 0, encode)
        self.last_activity = time.monotonic()
        if chunk_request.chunks == 0:
            self.chunk_requests.popleft()

    def notify_queue_position(self, queue_position: int, waiting: int, size: tuple[int, int]) -> None:
        """Tell the client its place in the queue, if that is news."""
        if queue_position != self.queue_position and self.chunk_requests:
            self.queue_position = queue_position
            notice = (
                f"waiting for a slot: place {queue_position} of {waiting}"
                if queue_position
                else "a slot is free: generating"
            )
            self.chunk_requests[0].sender.send(notice_chunk(size, notice=notice), final=False)


def _with_snapshot(snapshot: Callable[[], bytes], encode: Encode | None, chunk: FrameChunk) -> FrameChunk:
    chunk = dataclasses.replace(chunk, snapshot=snapshot())
    return chunk if encode is None else encode(chunk)


def notice_chunk(size: tuple[int, int], notice: str = "", **fields: Any) -> FrameChunk:
    """A response without frames, for videos of `size` (height and width)."""
    frames = np.empty((0, *size, 3), np.uint8)
    return FrameChunk(frames=frames, notice=notice, **({"first_frame": 0, "prompt_index": 0} | fields))
