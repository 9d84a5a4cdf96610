# SPDX-License-Identifier: Apache-2.0
"""The service: takes requests from any thread and answers them from one.

Called by `model.py`. One worker thread owns the pipeline, every send and every statistic, because Triton's Python
backend crashes when several threads send or count. It knows neither Triton (answers leave through a `Sink`) nor
what a chunk is made of.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from longlive_serve.pipeline import Pipeline
from longlive_serve.protocol import RECACHE, FrameChunk, Request, ServeError
from longlive_serve.scheduler import Scheduler
from longlive_serve.session import NOW, Prompt, SeededNoise, Session

log = logging.getLogger(__name__)

POLL_S = 0.05  # how often a worker with nothing to generate looks for dead clients


def _described(description: str) -> int:
    field: int = dataclasses.field(default=0, metadata={"description": description})
    return field


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the service is doing; given to `on_statistics` by the worker whenever it changed."""

    live_sessions: int = _described("sessions that hold a slot")
    waiting_sessions: int = _described("sessions that wait for a slot")
    chunks: int = _described("chunks generated since the start")
    failed_sessions: int = _described("sessions that ended with an error since the start")

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Name -> what it counts."""
        return {field.name: field.metadata["description"] for field in dataclasses.fields(cls)}


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
    heard: float
    """When the client last sent a request, or was last sent a chunk (monotonic seconds)."""


class VideoService:
    """Runs sessions on one pipeline: `slots` of them at a time, the others wait in the order of their START."""

    def __init__(
        self,
        pipeline: Pipeline,
        slots: int,
        idle_timeout_s: float,
        on_statistics: Callable[[Statistics], None] = lambda statistics: None,
    ) -> None:
        self._pipeline = pipeline
        self._idle_timeout_s = idle_timeout_s
        self._on_statistics = on_statistics
        self._published = Statistics()
        self._chunks = 0
        self._failed_sessions = 0
        self._scheduler = Scheduler(slots)
        self._streams: dict[str, Stream] = {}
        self._mail: queue.SimpleQueue[tuple[Request | ServeError, Sink] | None] = queue.SimpleQueue()
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._run, name="longlive-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request | ServeError, sink: Sink) -> None:
        """Take a request (or the error that stands in its place) from any thread; the answer goes to `sink`."""
        self._mail.put((request, sink))

    def drain(self) -> None:
        """End every session with an error that says so, and from now on every new one. May be called by any thread."""
        self._draining.set()
        self._mail.put(None)

    def stop(self) -> None:
        """Drain and end the worker. Returns when it has ended; nothing may be submitted after that."""
        self._stopping.set()
        self.drain()
        self._worker.join()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._take_turn()
            except Exception as error:  # a bug outside any session's border: nobody may wait for ever
                log.exception("the worker failed; every session ends")
                self._end_all(ServeError(ServeError.INTERNAL, f"the server failed: {type(error).__name__}: {error}"))
        self._take_turn()

    def _take_turn(self) -> None:
        """One round of the worker: requests, departures, arrivals, and one session's next chunk."""
        self._read_mail()
        if self._draining.is_set():
            self._end_all(ServeError(ServeError.SHUTTING_DOWN, "the server is shutting down; connect again later"))
        self._drop_the_gone()
        for session_id, slot in self._scheduler.admit():
            self._streams[session_id].session.slot = slot
        turn = self._scheduler.next(lambda session_id: bool(self._streams[session_id].orders))
        if turn is not None:
            self._advance(self._streams[turn])
        self._publish()

    def _read_mail(self) -> None:
        """Handle all requests that have come in; wait for one when there is nothing to generate."""
        busy = self._stopping.is_set() or any(
            stream.orders and stream.session.slot >= 0 for stream in self._streams.values()
        )
        timeout = 0.0 if busy else POLL_S if self._streams else None
        for request, sink in self._take_all_mail(timeout):
            try:
                if isinstance(request, ServeError):
                    raise request
                self._handle(request, sink)
            except ServeError as error:
                self._close(sink, error)
            except Exception as error:  # a request's border
                log.exception("a request failed")
                self._close(sink, ServeError(ServeError.INTERNAL, f"{type(error).__name__}: {error}"))

    def _take_all_mail(self, timeout: float | None = 0.0) -> Iterable[tuple[Request | ServeError, Sink]]:
        try:
            letter = self._mail.get(timeout != 0.0, timeout)
            while True:
                if letter is not None:
                    yield letter
                letter = self._mail.get_nowait()
        except queue.Empty:
            return

    def _handle(self, request: Request, sink: Sink) -> None:
        """Raises ServeError when the request cannot be taken; its session, if any, goes on."""
        stream = self._streams.get(request.session_id)
        if request.start:
            if stream is not None:
                raise ServeError(
                    ServeError.SESSION_EXISTS, f"session {request.session_id} is live; START with a new id"
                )
            self._start(request, sink)
        elif stream is None:
            raise ServeError(
                ServeError.UNKNOWN_SESSION,
                f"session {request.session_id} is not live here: it has ended, failed or never started; send a START",
            )
        else:
            self._update(stream, request, sink)

    def _start(self, request: Request, sink: Sink) -> None:
        assert request.prompt is not None
        session = Session(
            id=request.session_id,
            prompt=Prompt(index=0, text=request.prompt),
            noise=SeededNoise(request.seed or 0),
            global_sink=request.options.global_sink is not False,
            on_switch=request.options.on_switch or RECACHE,
        )
        orders = deque([Order(sink, request.chunks or None)])
        self._streams[session.id] = Stream(session, orders, request.end, time.monotonic())
        self._scheduler.add(session.id)
        log.info("session %s: started, seed %s, chunks %s", session.id, request.seed or 0, request.chunks or "any")

    def _update(self, stream: Stream, request: Request, sink: Sink) -> None:
        stream.heard = time.monotonic()
        index = stream.session.prompt.index
        if request.prompt is not None:
            frame = request.options.at_latent_frame
            index = stream.session.add_prompt(request.prompt, NOW if frame is None else frame).index
        if request.chunks is not None:
            stream.orders.append(Order(sink, request.chunks or None))
        else:
            first_frame = self._pipeline.first_frame(stream.session.chunk)
            empty = np.empty((0, *self._pipeline.config.video_size, 3), np.uint8)
            sink.send(FrameChunk(frames=empty, first_frame=first_frame, prompt_index=index), final=True)
        if request.end:
            stream.ending = True
            if request.chunks is None:
                self._end(stream)

    def _drop_the_gone(self) -> None:
        """End sessions whose client went away, and those that hold on to a slot without using it."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if any(order.sink.is_cancelled() for order in stream.orders):
                self._end(stream, ServeError(ServeError.CANCELLED, "the client cancelled the request"))
            elif not stream.orders and now - stream.heard > self._idle_timeout_s:
                log.info("session %s: idle for %g s", stream.session.id, self._idle_timeout_s)
                self._end(stream)

    def _advance(self, stream: Stream) -> None:
        """Generate and send one chunk. Whatever fails in it ends this session alone."""
        order = stream.orders[0]
        try:
            chunk = self._pipeline.advance(stream.session)
            if order.chunks is not None:
                order.chunks -= 1
            order.sink.send(chunk, final=order.chunks == 0)
        except ServeError as error:
            self._end(stream, error)
            return
        except Exception as error:  # the session's border: the server outlives any session
            log.exception("session %s: failed at chunk %d", stream.session.id, stream.session.chunk)
            self._end(stream, ServeError(ServeError.INTERNAL, f"the session failed: {type(error).__name__}: {error}"))
            return
        stream.heard = time.monotonic()
        self._chunks += 1
        if order.chunks == 0:
            stream.orders.popleft()
            if stream.ending and not stream.orders:
                self._end(stream)

    def _end(self, stream: Stream, error: ServeError | None = None) -> None:
        """Free the session's slot and close what is still open of it, with the error if there is one."""
        del self._streams[stream.session.id]
        self._scheduler.remove(stream.session.id)
        for order in stream.orders:
            self._close(order.sink, error)
        if error is not None and error.kind not in (ServeError.CANCELLED, ServeError.SHUTTING_DOWN):
            self._failed_sessions += 1
        log.info("session %s: ended after %d chunks (%s)", stream.session.id, stream.session.chunk, error or "complete")

    def _end_all(self, error: ServeError) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, error)

    def _close(self, sink: Sink, error: ServeError | None = None) -> None:
        """Send the end of an answer; a client that cannot be told is not worth an exception."""
        try:
            if error is None:
                sink.send(None, final=True)
            else:
                sink.fail(error)
        except Exception:
            log.exception("the end of an answer could not be delivered (%s)", error)

    def _publish(self) -> None:
        statistics = Statistics(
            live_sessions=self._scheduler.live,
            waiting_sessions=self._scheduler.waiting,
            chunks=self._chunks,
            failed_sessions=self._failed_sessions,
        )
        if statistics != self._published:
            self._published = statistics
            self._on_statistics(statistics)
