# SPDX-License-Identifier: Apache-2.0
"""Standard output and error that never block or raise, even if they are closed, full or not read.

Used by the server's command line and by the log of Triton.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import threading
from typing import TextIO

MAX_PENDING = 10_000  # pieces of text
RETRY_S = 1.0


def reserve_standard_descriptors() -> None:
    """Open the null device for each closed one, so that no file that is opened later gets its number."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number


class Output:
    """Writes to a stream in a thread of its own. Drops text when the queue is full. Never raises or blocks."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: may be None (closed), or have no descriptor (in tests)."""
        self._stream = stream
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_PENDING)
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        if self._stream is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="longlive-output", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(text.encode(errors="replace"))
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Write what is in the queue, for at most this long; the rest is lost."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
                self._thread.join(seconds)
            self._thread = None

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                data = b"(%d lines were dropped here: the output was not read)\n" % dropped + data
            with contextlib.suppress(OSError, ValueError):  # closed by its reader, or the disk is full
                self._write(data)

    def _write(self, data: bytes) -> None:
        assert self._stream is not None
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            self._stream.write(data.decode())
            return
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:  # another process has set O_NONBLOCK
                select.select([], [descriptor], [], RETRY_S)


class Console:
    """What a command prints."""

    def __init__(self) -> None:
        self._out, self._err = Output(sys.stdout), Output(sys.stderr)

    def print(self, text: str) -> None:
        """A result, to stdout."""
        self._out.write(text + "\n")

    def info(self, text: str) -> None:
        """Progress and errors, to stderr."""
        self._err.write(text + "\n")

    def close(self) -> None:
        self._out.close()
        self._err.close()
