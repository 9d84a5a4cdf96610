# SPDX-License-Identifier: Apache-2.0
"""The only thread that calls Triton: it sends all responses and updates all metrics, in order.

Used by the engine core's worker, which generates the next chunk while the last one is encoded and sent. One thread,
because Triton's Python backend crashes when several threads send responses or update metrics.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from longlive_serve.engine.client_stream import Encode, ResponseSender
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk

log = logging.getLogger(__name__)

MAX_JOBS = 64  # in the queue


class ResponseWriter:
    """Runs jobs one after the other in its own thread."""

    def __init__(self) -> None:
        self.bytes = 0
        """Bytes of frames sent so far."""
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(MAX_JOBS)
        self._thread = threading.Thread(target=self._run, name="longlive-responses", daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        """Queue a job. Blocks while the queue is full, which slows generation down to the rate of sending."""
        self._jobs.put(job)

    def stop(self) -> None:
        """Run the queued jobs, then end."""
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # a job's boundary
                log.exception("a response or a metric could not be sent")


class QueuedResponseSender:
    """A sender that sends through a response writer."""

    def __init__(self, sender: ResponseSender, writer: ResponseWriter) -> None:
        self._sender, self._writer = sender, writer
        self._failed = False

    def send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None = None) -> None:
        self._writer.put(lambda: self._send(chunk, final, encode))

    def fail(self, error: RequestError) -> None:
        self._writer.put(lambda: self._fail(error))

    def is_cancelled(self) -> bool:
        return self._failed or self._sender.is_cancelled()

    def _send(self, chunk: FrameChunk | None, final: bool, encode: Encode | None) -> None:
        if self._failed:
            return
        try:
            if chunk is not None and encode is not None:
                chunk = encode(chunk)
            if chunk is not None:
                self._writer.bytes += chunk.frames.nbytes + sum(map(len, chunk.encoded))
            self._sender.send(chunk, final)
        except Exception as error:
            log.exception("a response could not be sent")
            text = f"the response could not be sent: {type(error).__name__}: {error}"
            self._fail(RequestError(RequestError.INTERNAL, text))

    def _fail(self, error: RequestError) -> None:
        """Send the error once, if possible; `is_cancelled` is then True, so that the worker ends the session."""
        if not self._failed:
            self._failed = True
            self._sender.fail(error)
