# SPDX-License-Identifier: Apache-2.0
"""The service: takes requests from any thread and answers them from one.

Called by `model.py`. One worker thread owns the pipeline, every send and every statistic, because Triton's Python
backend crashes when several threads send or count. It knows neither Triton (answers leave through a `Sink`) nor
what a chunk is made of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from longlive_serve.config import FPS, ServeConfig
from longlive_serve.mailbox import Mailbox
from longlive_serve.pipeline import Pipeline
from longlive_serve.protocol import ASAP, READY, RECACHE, Request, ServeError
from longlive_serve.scheduler import SECOND, Scheduler
from longlive_serve.session import MAX_PENDING, NOW, Prompt, SeededNoise, Session
from longlive_serve.snapshot import dump, load_session
from longlive_serve.statistics import Statistics
from longlive_serve.stream import Order, Sink, Stream, close, notice_chunk

log = logging.getLogger(__name__)

POLL_S = 0.05  # how often a worker with nothing to generate looks for dead clients
NO_FAILURE = (ServeError.CANCELLED, ServeError.SHUTTING_DOWN, ServeError.UNAVAILABLE)  # ends that are nobody's fault


class VideoService:
    """Runs sessions on one pipeline: as many as there are slots and time for, the others wait in a bounded queue."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: ServeConfig,
        on_statistics: Callable[[Statistics], None] = lambda statistics: None,
        chunk_s: float = 0.0,
    ) -> None:
        """`chunk_s`: seconds that a chunk takes, as measured beforehand; 0: the first chunk will tell."""
        self._pipeline = pipeline
        self._config = config
        self._on_statistics = on_statistics
        self._published = Statistics()
        self._chunks = self._failed = self._refused = self._resumed_sessions = 0
        self._scheduler = Scheduler(config.slots, cost=round(chunk_s * SECOND), headroom=config.headroom)
        self._streams: dict[str, Stream] = {}
        self._mail = Mailbox()
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._run, name="longlive-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request | ServeError, sink: Sink) -> None:
        """Take a request (or the error that stands in its place) from any thread; the answer goes to `sink`."""
        self._mail.put(request, sink)

    def drain(self) -> None:
        """End every session with an error that says so, and from now on every new one. May be called by any thread."""
        self._draining.set()
        self._mail.wake()

    def stop(self) -> None:
        """Drain and end the worker. Returns when it has ended; nothing may be submitted after that."""
        self._stopping.set()
        self.drain()
        self._worker.join()

    def _run(self) -> None:
        self._publish()
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
            self._end_all(self._goodbye())
        self._drop_the_gone()
        for session_id, slot in self._scheduler.admit(time.monotonic_ns()):
            self._streams[session_id].session.slot = slot
        self._tell_the_waiting()
        turn, _ = self._scheduler.next(time.monotonic_ns())
        if turn is not None:
            self._advance(self._streams[turn])
        self._publish()

    def _time_to_wait(self) -> float | None:
        """Seconds for which nothing but a request can give the worker something to do; None: any time."""
        now = time.monotonic_ns()
        turn, wake = self._scheduler.next(now)
        if turn is not None or self._stopping.is_set():
            return 0.0
        if not self._streams:
            return None
        return POLL_S if wake is None else max(0.0, min(POLL_S, (wake - now) / SECOND))

    def _read_mail(self) -> None:
        """Handle all requests that have come in; wait for one when there is nothing to generate."""
        timeout = self._time_to_wait()
        for request, sink in self._mail.take_all(timeout):
            try:
                if isinstance(request, ServeError):
                    raise request
                self._handle(request, sink)
            except ServeError as error:
                close(sink, error)
            except Exception as error:  # a request's border
                log.exception("a request failed")
                close(sink, ServeError(ServeError.INTERNAL, f"{type(error).__name__}: {error}"))

    def _handle(self, request: Request, sink: Sink) -> None:
        """Raises ServeError when the request cannot be taken; its session, if any, goes on."""
        if request.probes:
            self._answer_probe(sink)
            return
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

    def _answer_probe(self, sink: Sink) -> None:
        if self._draining.is_set():
            raise self._goodbye()
        scheduler = self._scheduler
        full = f"full: {scheduler.live} sessions are live, {scheduler.waiting} wait"
        notice = READY if scheduler.has_room(FPS) else full
        sink.send(notice_chunk(self._pipeline.config.video_size, notice=notice), final=True)

    def _goodbye(self) -> ServeError:
        return ServeError(ServeError.SHUTTING_DOWN, "the server is shutting down; connect again later")

    def _start(self, request: Request, sink: Sink) -> None:
        options = request.options
        session = self._resumed(request) if request.snapshot is not None else _new_session(request)
        orders = deque([Order(sink, request.chunks or None)])
        snapshot_every = options.snapshot_every or 0
        self._streams[session.id] = Stream(session, orders, request.end, time.monotonic(), snapshot_every)
        fps = None if options.pace == ASAP else options.fps or FPS
        self._scheduler.add(session.id, time.monotonic_ns(), fps=fps, lead=self._config.lead)
        pace = "asap" if fps is None else f"{fps} fps"
        log.info("session %s: started at chunk %d, chunks %s, %s", session.id, session.chunk, request.chunks, pace)

    def _resumed(self, request: Request) -> Session:
        assert request.snapshot is not None
        engines, network = self._pipeline.engines, self._pipeline.config
        session = load_session(request.snapshot, request.session_id, network, engines.device, self._pipeline.dtype)
        self._resumed_sessions += 1
        return session

    def _full(self, why: str) -> ServeError:
        self._refused += 1
        return ServeError(ServeError.UNAVAILABLE, f"{why}; try again in {self._config.max_wait_s:g} s")

    def _update(self, stream: Stream, request: Request, sink: Sink) -> None:
        session = stream.session
        stream.heard = time.monotonic()
        for asked, pending, what in (
            (request.prompt, session.pending, "PROMPT: got one while {} others wait for their time"),
            (request.chunks, stream.orders, "CHUNKS: got some while {} requests for chunks are open"),
        ):
            if asked is not None and len(pending) >= MAX_PENDING:
                text = f"{what.format(len(pending))}, expected fewer than {MAX_PENDING}"
                raise ServeError(ServeError.INVALID_REQUEST, text)
        index = session.prompt.index
        if request.prompt is not None:
            frame = request.options.at_latent_frame
            index = session.add_prompt(request.prompt, NOW if frame is None else frame).index
            if frame is None:
                self._scheduler.hurry(session.id)
        if request.chunks is not None:
            stream.orders.append(Order(sink, request.chunks or None))
            self._scheduler.ready(session.id, time.monotonic_ns())
        else:
            first_frame = self._pipeline.first_frame(session.chunk)
            size = self._pipeline.config.video_size
            sink.send(notice_chunk(size, first_frame=first_frame, prompt_index=index), final=True)
        if request.end:
            stream.ending = True
            if request.chunks is None:
                self._end(stream)

    def _drop_the_gone(self) -> None:
        """End sessions whose client went away, and those that hold on to a slot without using it."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            if stream.gone:
                self._end(stream, ServeError(ServeError.CANCELLED, "the client cancelled the request"))
            elif not stream.orders and now - stream.heard > self._config.idle_timeout_s:
                log.info("session %s: idle for %g s", stream.session.id, self._config.idle_timeout_s)
                self._end(stream)

    def _tell_the_waiting(self) -> None:
        """Say to those who wait where they stand; refuse those for whom the queue is too long."""
        now, config, size = time.monotonic(), self._config, self._pipeline.config.video_size
        for stream in list(self._streams.values()):
            place = self._scheduler.place(stream.session.id)
            if place > config.max_waiting:
                self._end(stream, self._full(f"{config.max_waiting} sessions are waiting for a slot already"))
            elif place and now - stream.came > config.max_wait_s:
                self._end(stream, self._full(f"no slot became free in {config.max_wait_s:g} s"))
            else:
                with self._border_of(stream):
                    stream.tell_place(place, self._scheduler.waiting, size)

    def _advance(self, stream: Stream) -> None:
        """Generate and send one chunk."""
        session_id, began = stream.session.id, time.monotonic_ns()
        with self._border_of(stream):
            chunk = self._pipeline.advance(stream.session)
            if stream.wants_snapshot:
                chunk = dataclasses.replace(chunk, snapshot=dump(stream.session, self._pipeline.config))
            stream.deliver(chunk)
            now = time.monotonic_ns()
            late = self._scheduler.done(session_id, now, len(chunk.frames), now - began)
            if late:
                log.warning("session %s: chunk %d came %.3f s late", session_id, stream.session.chunk, late / SECOND)
            self._chunks += 1
            if not stream.orders:
                self._scheduler.rest(session_id)
                if stream.ending:
                    self._end(stream)

    @contextlib.contextmanager
    def _border_of(self, stream: Stream) -> Iterator[None]:
        """Whatever fails within ends this session alone: the server outlives any session."""
        try:
            yield
        except ServeError as error:
            self._end(stream, error)
        except Exception as error:
            log.exception("session %s: failed at chunk %d", stream.session.id, stream.session.chunk)
            self._end(stream, ServeError(ServeError.INTERNAL, f"the session failed: {type(error).__name__}: {error}"))

    def _end(self, stream: Stream, error: ServeError | None = None) -> None:
        """Free the session's slot and close what is still open of it, with the error if there is one."""
        del self._streams[stream.session.id]
        self._scheduler.remove(stream.session.id)
        for order in stream.orders:
            close(order.sink, error)
        if error is not None and error.kind not in NO_FAILURE:
            self._failed += 1
        log.info("session %s: ended after %d chunks (%s)", stream.session.id, stream.session.chunk, error or "complete")

    def _end_all(self, error: ServeError) -> None:
        for stream in list(self._streams.values()):
            self._end(stream, error)

    def _publish(self) -> None:
        statistics = Statistics(
            live_sessions=self._scheduler.live,
            waiting_sessions=self._scheduler.waiting,
            chunks=self._chunks,
            failed_sessions=self._failed,
            refused_sessions=self._refused,
            resumed_sessions=self._resumed_sessions,
            deadline_misses=self._scheduler.deadline_misses,
            capacity_sessions=self._scheduler.capacity(FPS),
        )
        if statistics != self._published:
            self._published = statistics
            self._on_statistics(statistics)


def _new_session(request: Request) -> Session:
    assert request.prompt is not None
    return Session(
        id=request.session_id,
        prompt=Prompt(index=0, text=request.prompt),
        noise=SeededNoise(request.seed or 0),
        global_sink=request.options.global_sink is not False,
        on_switch=request.options.on_switch or RECACHE,
    )
