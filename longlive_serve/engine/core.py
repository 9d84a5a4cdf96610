# SPDX-License-Identifier: Apache-2.0
"""The service: takes requests from any thread, generates in one, and answers from another.

Called by `model.py`. The worker owns the pipeline and the sessions; what it sends and counts leaves through an
`Outbox`. It knows neither Triton (answers leave through a `Sink`) nor what a chunk is made of.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from longlive_serve.backends.device import ToHost, use_device
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.client_stream import Sink, Stream
from longlive_serve.engine.inflight import ChunkInFlight
from longlive_serve.engine.lora_manager import Adapters
from longlive_serve.engine.mailbox import Mailbox
from longlive_serve.engine.model_runner import Pipeline
from longlive_serve.engine.response_writer import Outbox, OutboxSink
from longlive_serve.engine.scheduler import SECOND
from longlive_serve.engine.session_manager import Sessions, goodbye
from longlive_serve.engine.snapshot import dump_later, read_tensors
from longlive_serve.observability.metrics import Change
from longlive_serve.protocol.errors import ServeError
from longlive_serve.protocol.messages import FrameChunk, Request

log = logging.getLogger(__name__)

POLL_S = 0.05  # how often a worker with nothing to generate looks for dead clients


class Launched(NamedTuple):
    """A chunk in flight, whose it is, and what its snapshot takes of the device, if one goes with it."""

    stream: Stream
    chunk: ChunkInFlight
    tensors: Mapping[str, ToHost]


class VideoService:
    """Runs sessions on one pipeline: as many as there are slots and time for, the others wait in a bounded queue."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: ServeConfig,
        on_statistics: Callable[[Sequence[Change]], None] = lambda changes: None,
        chunk_s: float = 0.0,
    ) -> None:
        """`on_statistics`: is told the figures that have changed. `chunk_s`: seconds that a chunk takes, as measured
        beforehand; 0: the first chunk will tell."""
        self._pipeline = pipeline
        self._on_statistics = on_statistics
        self._sessions = Sessions(pipeline, config, chunk_s)
        self._mail = Mailbox()
        self._adapters = Adapters(pipeline, config, self._mail.wake)
        self._outbox = Outbox()
        self._in_flight: Launched | None = None
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._run, name="longlive-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request | ServeError, sink: Sink) -> None:
        """Take a request (or the error that stands in its place) from any thread; the answer goes to `sink`."""
        self._mail.put(request, OutboxSink(sink, self._outbox))

    def drain(self) -> None:
        """End every session soon, with an error that says so, and every new one. May be called by any thread."""
        self._draining.set()
        self._mail.wake()

    def stop(self) -> None:
        """Drain and end the threads. Returns when they have ended; nothing may be submitted after that."""
        self._stopping.set()
        self.drain()
        self._worker.join()
        self._outbox.stop()

    def _run(self) -> None:
        use_device(self._pipeline.engines.device)
        self._publish()
        while not self._stopping.is_set():
            try:
                self._take_turn()
            except Exception as error:  # a bug outside any session's border: nobody may wait for ever
                log.exception("the worker failed; every session ends")
                text = f"the server failed: {type(error).__name__}: {error}"
                self._in_flight = None
                self._sessions.end_all(ServeError(ServeError.INTERNAL, text))
        self._take_turn()

    def _take_turn(self) -> None:
        """One round of the worker: it looks around, and has one session's next chunk generated.

        That is launched while the device still decodes the one before, which is finished then: the device has no pause.
        """
        self._look_around()
        if self._in_flight is not None:
            self._pipeline.wait_until_denoised(self._in_flight.chunk)
            self._read_mail()  # what came meanwhile
            self._sessions.admit()
        turn, _ = self._sessions.scheduler.next(time.monotonic_ns())
        launched = None if turn is None else self._launch(self._sessions[turn])
        self._finish()
        self._in_flight = launched
        if not self._pipeline.asynchronous:
            self._finish()

    def _look_around(self) -> None:
        """Requests, departures, arrivals. The device denoises meanwhile: to ask Triton who is gone takes its time."""
        sessions = self._sessions
        self._read_mail()
        if self._draining.is_set():
            self._finish()  # a last snapshot goes on after what its client has been sent
            sessions.say_goodbye(at_once=self._stopping.is_set())
            self._adapters.abandon(goodbye())
        self._adapters.apply()
        sessions.drop_the_gone()
        sessions.admit()
        sessions.tell_the_waiting()
        self._publish()  # before the chunk: who has it can look at the figures

    def _time_to_wait(self) -> float | None:
        """Seconds for which nothing but a request can give the worker something to do; None: any time."""
        now = time.monotonic_ns()
        turn, wake = self._sessions.scheduler.next(now)
        if turn is not None or self._in_flight is not None or self._stopping.is_set():
            return 0.0
        if not len(self._sessions):
            return None
        return POLL_S if wake is None else max(0.0, min(POLL_S, (wake - now) / SECOND))

    def _read_mail(self) -> None:
        """Handle all requests that have come in; wait for one when there is nothing to generate."""
        timeout = self._time_to_wait()
        for request, sink in self._mail.take_all(timeout):
            try:
                if isinstance(request, ServeError):
                    raise request
                if request.sets_adapters:
                    self._adapters.change(request.options, sink)
                else:
                    self._sessions.handle(request, sink, self._draining.is_set())
            except ServeError as error:
                sink.fail(error)
            except Exception as error:  # a request's border
                log.exception("a request failed")
                sink.fail(ServeError(ServeError.INTERNAL, f"{type(error).__name__}: {error}"))

    def _launch(self, stream: Stream) -> Launched | None:
        with self._border_of(stream):
            self._sessions.scheduler.begin(stream.session.id, time.monotonic_ns())
            chunk = self._pipeline.launch(stream.session, stream.early_frames)
            return Launched(stream, chunk, read_tensors(stream.session) if stream.wants_snapshot else {})
        return None

    def _finish(self) -> None:
        """Send the chunk in flight, if there is one."""
        if self._in_flight is None:
            return
        (stream, chunk, tensors), self._in_flight = self._in_flight, None
        if stream not in self._sessions:  # it has ended meanwhile
            return
        with self._border_of(stream):
            frames, snapshot = 0, None
            for part in self._pipeline.finish(chunk):
                frames += len(part.frames)
                if part.completes:
                    self._note_end(stream, part, frames)
                    if tensors:
                        snapshot = dump_later(stream.session, self._pipeline.config, tensors)
                stream.deliver(part, snapshot)
                self._sessions.delivered(stream, part)
                if stream not in self._sessions:  # that was its last chunk: nobody needs the commit
                    break
        self._publish()

    def _note_end(self, stream: Stream, chunk: FrameChunk, frames: int) -> None:
        """The scheduler wants to know when a chunk of so many frames was there."""
        session, now = stream.session, time.monotonic_ns()
        late = self._sessions.scheduler.done(session.id, now, frames, round(chunk.seconds * SECOND))
        if late:
            log.warning("chunk %d came %.3f s late", session.chunk - 1, late / SECOND, extra=stream.named)

    @contextlib.contextmanager
    def _border_of(self, stream: Stream) -> Iterator[None]:
        """Whatever fails within ends this session alone: the server outlives any session."""
        try:
            yield
        except ServeError as error:
            self._sessions.end(stream, error)
        except Exception as error:
            log.exception("failed at chunk %d", stream.session.chunk, extra=stream.named)
            text = f"the session failed: {type(error).__name__}: {error}"
            self._sessions.end(stream, ServeError(ServeError.INTERNAL, text))

    def _publish(self) -> None:
        changes = self._sessions.take_stock()
        if changes:  # the bytes are counted where they are sent
            self._outbox.put(lambda: self._on_statistics([*changes, ("bytes", (), self._outbox.bytes)]))
