# SPDX-License-Identifier: Apache-2.0
"""A session together with the client behind it: what was asked for, and where the answers go.

Used by the service's worker alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import deque
from typing import Protocol

import numpy as np

from longlive_serve.protocol import FrameChunk, ServeError
from longlive_serve.session import Session

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where the answers to one request go. `final` closes it: nothing is sent after that."""

    def send(self, chunk: FrameChunk | None, final: bool) -> None:
        """Send a chunk (or only the end, without one)."""
        ...

    def fail(self, error: ServeError) -> None:
        """Send an error and close."""
        ...

    def is_cancelled(self) -> bool:
        """True when the client has gone."""
        ...


@dataclasses.dataclass
class Order:
    """Chunks that a client asked for with one request, and where they go."""

    sink: Sink
    chunks: int | None
    """Still to send; None: until stopped."""


@dataclasses.dataclass
class Stream:
    """A session and the client behind it."""

    session: Session
    orders: deque[Order]
    ending: bool
    """True once the client has said END: the session ends with its last order."""
    came: float
    """When its START came (monotonic seconds, as all times here)."""
    snapshot_every: int = 0
    """Chunks from one snapshot to the next; 0: none are sent."""
    heard: float = 0.0
    """When the client last sent a request, or was last sent a chunk."""
    place: int = 0
    """The place in the queue that the client was last told; 0: none."""

    def __post_init__(self) -> None:
        self.heard = self.came

    @property
    def wants_snapshot(self) -> bool:
        """Whether the chunk just generated goes out with a snapshot."""
        return bool(self.snapshot_every) and self.session.chunk % self.snapshot_every == 0

    @property
    def gone(self) -> bool:
        """True when the client has left an answer unheard."""
        return any(order.sink.is_cancelled() for order in self.orders)

    def deliver(self, chunk: FrameChunk) -> None:
        """Send a chunk as part of the oldest order, and close the order with its last one."""
        order = self.orders[0]
        if order.chunks is not None:
            order.chunks -= 1
        order.sink.send(chunk, final=order.chunks == 0)
        self.heard = time.monotonic()
        if order.chunks == 0:
            self.orders.popleft()

    def tell_place(self, place: int, waiting: int, size: tuple[int, int]) -> None:
        """Tell the client its place in the queue, if that is news."""
        if place != self.place and self.orders:
            self.place = place
            notice = f"waiting for a slot: place {place} of {waiting}" if place else "a slot is free: generating"
            self.orders[0].sink.send(notice_chunk(size, notice=notice), final=False)


def notice_chunk(size: tuple[int, int], *, first_frame: int = 0, prompt_index: int = 0, notice: str = "") -> FrameChunk:
    """A response without frames, for videos of `size` (height and width)."""
    frames = np.empty((0, *size, 3), np.uint8)
    return FrameChunk(frames=frames, first_frame=first_frame, prompt_index=prompt_index, notice=notice)


def close(sink: Sink, error: ServeError | None = None) -> None:
    """Send the end of an answer; a client that cannot be told is not worth an exception."""
    try:
        if error is None:
            sink.send(None, final=True)
        else:
            sink.fail(error)
    except Exception:
        log.exception("the end of an answer could not be delivered (%s)", error)
