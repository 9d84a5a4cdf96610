# SPDX-License-Identifier: Apache-2.0
"""A session together with its client: the open requests for chunks, and the senders of the responses.

Used only in the engine core's worker thread.
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
    """A sender that applies `encode` in its own thread."""

    def send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None = None) -> None: ...


@dataclasses.dataclass
class ChunkRequest:
    """One request for chunks, and the sender of its responses."""

    sender: EncodingResponseSender
    chunks: int | None
    """Chunks still to send; None: until stopped."""


@dataclasses.dataclass
class ClientStream:
    """A session and its client."""

    session: Session
    chunk_requests: deque[ChunkRequest]
    end_requested: bool
    """The client has sent END: the session ends after its last request for chunks."""
    arrival_time: float
    """When its START arrived (monotonic seconds, like all times here)."""
    max_wait_s: float
    """Maximum wait for a slot."""
    snapshot_every: int = 0
    """Chunks between snapshots; 0: none are sent."""
    stream_partial_chunks: bool = False
    """Send frames as soon as each latent frame is decoded."""
    encode: Encode | None = None
    """Encodes frames in the session's format; None: raw."""
    trace: Trace | None = None
    needs_first_frame: bool = True
    switch_times: dict[int, float] = dataclasses.field(default_factory=dict)
    """Arrival times of prompts for the next chunk, by prompt index."""
    last_activity: float = 0.0
    """When the last request arrived or the last chunk was sent."""
    queue_position: int = 0
    """The queue position in the last notice to the client; 0: none."""
    unacked: int = 0
    """Chunks sent since the client's last request; it may not have read them."""
    request_times: deque[float] = dataclasses.field(default_factory=deque)
    """Arrival times of its requests in the last RATE_WINDOW_S."""

    def __post_init__(self) -> None:
        self.last_activity = self.arrival_time

    @property
    def log_extra(self) -> dict[str, str]:
        """The `extra` of log records about this session."""
        return {"session": self.session.id}

    def trace_chunk(self, chunk: FrameChunk, phases: Sequence[Phase]) -> None:
        """Add a chunk to the session's trace, if it has one."""
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
        """Raises RequestError if a later request of this session has a wrong token or exceeds a limit."""
        expected, token = self.session.token, request.options.session_token or ""
        if expected and not hmac.compare_digest(expected.encode(), token.encode()):
            text = f"OPTIONS.session_token: got {'another' if token else 'none'}, expected the one sent with START"
            raise RequestError(RequestError.FORBIDDEN, f"session {self.session.id}: {text}")
        now = time.monotonic()
        while self.request_times and now - self.request_times[0] > RATE_WINDOW_S:
            self.request_times.popleft()
        if len(self.request_times) >= max_per_s:
            text = f"got more than {max_per_s} requests in a second; wait {RATE_WINDOW_S:g} s"
            raise RequestError(RequestError.RATE_LIMITED, f"session {self.session.id}: {text}")
        self.request_times.append(now)
        for value, pending, message in (
            (request.prompt, self.session.pending, "PROMPT: got another with {} prompts pending"),
            (request.chunks, self.chunk_requests, "CHUNKS: got more with {} requests for chunks open"),
        ):
            if value is not None and len(pending) >= MAX_PENDING:
                text = f"{message.format(len(pending))}, expected fewer than {MAX_PENDING}"
                raise invalid(text)

    def record_request(self) -> None:
        """A request arrived, so the client has read what was sent to it."""
        self.last_activity, self.unacked = time.monotonic(), 0

    @property
    def needs_snapshot(self) -> bool:
        """Whether a snapshot is sent with the chunk just generated."""
        return bool(self.snapshot_every) and self.session.next_chunk % self.snapshot_every == 0

    @property
    def is_cancelled(self) -> bool:
        """True when the client has cancelled an open request for chunks."""
        return any(chunk_request.sender.is_cancelled() for chunk_request in self.chunk_requests)

    def send_chunk(self, chunk: FrameChunk, snapshot: Callable[[], bytes] | None = None) -> None:
        """Send a chunk (or a part of it) in response to the oldest request for chunks; its last chunk closes it.

        `snapshot`: serializes the snapshot to send with it; called in the sender's thread.
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
        """Send the client its position in the queue, if it has changed."""
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
