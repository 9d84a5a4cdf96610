# SPDX-License-Identifier: Apache-2.0
"""The engine core: takes requests from any thread, generates chunks in one worker thread, and answers from another.

Called by `model.py`. The worker thread owns the model runner and the sessions. Responses and metrics leave through a
`ResponseWriter`. The core knows neither Triton (it answers through a `ResponseSender`) nor how a chunk is computed.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from longlive_serve.backends.device import AsyncD2HCopy, use_device
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.client_stream import ClientStream, ResponseSender
from longlive_serve.engine.inflight import InflightChunk
from longlive_serve.engine.lora_manager import LoRAManager
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.response_writer import QueuedResponseSender, ResponseWriter
from longlive_serve.engine.scheduler import SECOND
from longlive_serve.engine.session_manager import SessionManager, shutting_down
from longlive_serve.engine.snapshot import copy_to_host, dump_later
from longlive_serve.observability.metrics import MetricUpdate
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk, Request
from longlive_serve.protocol.session_options import SET_LORA

log = logging.getLogger(__name__)

POLL_S = 0.05  # interval at which an idle worker checks for disconnected clients


class ScheduledChunk(NamedTuple):
    """A chunk in flight, its stream, and the tensors of the snapshot to send with it (empty: none)."""

    stream: ClientStream
    chunk: InflightChunk
    tensors: Mapping[str, AsyncD2HCopy]


class EngineCore:
    """Runs as many sessions on one model runner as fit in slots and time; further ones wait in a bounded queue."""

    def __init__(
        self,
        runner: ModelRunner,
        config: ServeConfig,
        on_metrics: Callable[[Sequence[MetricUpdate]], None] = lambda updates: None,
        chunk_s: float = 0.0,
    ) -> None:
        """`on_metrics`: called with the metrics that have changed. `chunk_s`: seconds per chunk, measured before; 0:
        the first chunk is measured."""
        self._runner = runner
        self._on_metrics = on_metrics
        self._sessions = SessionManager(runner, config, chunk_s)
        self._requests: queue.SimpleQueue[tuple[Request | RequestError, QueuedResponseSender] | None]
        self._requests = queue.SimpleQueue()  # None: only wakes the worker
        self._adapters = LoRAManager(runner, config, self._wake)
        self._writer = ResponseWriter()
        self._in_flight: ScheduledChunk | None = None
        self._draining = threading.Event()
        self._stopping = threading.Event()
        self._worker = threading.Thread(target=self._run, name="longlive-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request | RequestError, sender: ResponseSender) -> None:
        """Queue a request (or the error raised on reading it) from any thread; the answer goes to `sender`."""
        self._requests.put((request, QueuedResponseSender(sender, self._writer)))

    def drain(self) -> None:
        """Refuse new sessions, and end live ones soon with SHUTTING_DOWN. May be called from any thread."""
        self._draining.set()
        self._wake()

    def stop(self) -> None:
        """Drain, then end and join both threads. Nothing may be submitted afterwards."""
        self._stopping.set()
        self.drain()
        self._worker.join()
        self._writer.stop()

    def _wake(self) -> None:
        self._requests.put(None)

    def _run(self) -> None:
        use_device(self._runner.backends.device)
        self._publish()
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception as error:  # a bug outside `_catch_errors`: no client may wait forever
                log.exception("the worker failed; every session ends")
                text = f"the server failed: {type(error).__name__}: {error}"
                self._in_flight = None
                self._sessions.end_all(RequestError(RequestError.INTERNAL, text))
        self._step()

    def _step(self) -> None:
        """One iteration of the worker: housekeeping, and one session's next chunk.

        The chunk is launched while the device still decodes the previous one, so that the device is never idle.
        """
        self._housekeeping()
        if self._in_flight is not None:
            self._runner.wait_until_denoised(self._in_flight.chunk)
            self._process_requests()  # that arrived during denoising
            self._sessions.admit()
        turn, _ = self._sessions.scheduler.next(time.monotonic_ns())
        scheduled = None if turn is None else self._launch(self._sessions[turn])
        self._collect_output()
        self._in_flight = scheduled
        if not self._runner.asynchronous:
            self._collect_output()

    def _housekeeping(self) -> None:
        """Process requests, end and admit sessions, while the device denoises: Triton's cancellation check is slow."""
        sessions = self._sessions
        self._process_requests()
        if self._draining.is_set():
            self._collect_output()  # send this chunk first: the last snapshot includes it
            sessions.drain(at_once=self._stopping.is_set())
            self._adapters.cancel(shutting_down())
        self._adapters.apply()
        sessions.end_inactive()
        sessions.admit()
        sessions.notify_waiting()
        self._publish()  # before the chunk is sent: its client then reads current metrics

    def _get_timeout(self) -> float | None:
        """Seconds to wait for a request: 0 if there is other work, None for no limit."""
        now = time.monotonic_ns()
        session_id, next_time = self._sessions.scheduler.next(now)
        if session_id is not None or self._in_flight is not None or self._stopping.is_set():
            return 0.0
        if not len(self._sessions):
            return None
        return POLL_S if next_time is None else max(0.0, min(POLL_S, (next_time - now) / SECOND))

    def _process_requests(self) -> None:
        """Process the queued requests; wait for one if there is nothing to generate.

        Requests that arrive meanwhile stay queued for the next call, so that no request rate can stop generation.
        """
        timeout = self._get_timeout()
        try:
            items = [self._requests.get(timeout != 0.0, timeout)]
        except queue.Empty:
            return
        items += [self._requests.get_nowait() for _ in range(self._requests.qsize())]  # only this thread takes items
        for item in items:
            if item is not None:
                self._process_request(*item)

    def _process_request(self, request: Request | RequestError, sender: QueuedResponseSender) -> None:
        try:
            if isinstance(request, RequestError):
                raise request
            if request.options.command == SET_LORA:
                self._adapters.change(request.options, sender)
            else:
                self._sessions.handle(request, sender, self._draining.is_set())
        except RequestError as error:
            sender.fail(error)
        except Exception as error:  # a request's boundary
            log.exception("a request failed")
            sender.fail(RequestError(RequestError.INTERNAL, f"{type(error).__name__}: {error}"))

    def _launch(self, stream: ClientStream) -> ScheduledChunk | None:
        with self._catch_errors(stream):
            self._sessions.scheduler.begin(stream.session.id, time.monotonic_ns())
            chunk = self._runner.execute_model_async(stream.session, stream.stream_partial_chunks)
            return ScheduledChunk(stream, chunk, copy_to_host(stream.session) if stream.needs_snapshot else {})
        return None

    def _collect_output(self) -> None:
        """Send the chunk in flight, if there is one."""
        if self._in_flight is None:
            return
        (stream, chunk, tensors), self._in_flight = self._in_flight, None
        if stream not in self._sessions:  # it has ended since the launch
            return
        with self._catch_errors(stream):
            frames, snapshot = 0, None
            for part in self._runner.collect_output(chunk):
                frames += len(part.frames)
                if part.completes:
                    self._update_scheduler(stream, part, frames)
                    if tensors:
                        snapshot = dump_later(stream.session, self._runner.config, tensors)
                stream.send_chunk(part, snapshot)
                self._sessions.on_chunk_sent(stream, part)
                if stream not in self._sessions:  # its last chunk needs no KV-cache update
                    break
        self._publish()

    def _update_scheduler(self, stream: ClientStream, chunk: FrameChunk, frames: int) -> None:
        """Report a complete chunk of `frames` frames to the scheduler; log a missed deadline."""
        session, now = stream.session, time.monotonic_ns()
        delay = self._sessions.scheduler.done(session.id, now, frames, round(chunk.seconds * SECOND))
        if delay:
            log.warning("chunk %d was %.3f s late", session.next_chunk - 1, delay / SECOND, extra=stream.log_extra)

    @contextlib.contextmanager
    def _catch_errors(self, stream: ClientStream) -> Iterator[None]:
        """An exception in the block ends this session alone, not the server."""
        try:
            yield
        except RequestError as error:
            self._sessions.end(stream, error)
        except Exception as error:
            log.exception("failed at chunk %d", stream.session.next_chunk, extra=stream.log_extra)
            text = f"the session failed: {type(error).__name__}: {error}"
            self._sessions.end(stream, RequestError(RequestError.INTERNAL, text))

    def _publish(self) -> None:
        updates = self._sessions.collect_metrics()
        if updates:  # the writer counts the bytes
            self._writer.put(lambda: self._on_metrics([*updates, ("bytes", (), self._writer.bytes)]))
