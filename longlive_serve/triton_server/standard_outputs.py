# SPDX-License-Identifier: Apache-2.0
"""Standard output and error of a process that must go on whatever becomes of them: closed, full, or read by nobody.

Used by the server's command line and by the log of Triton. It knows descriptors and bytes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import sys
import threading
from typing import TextIO

MOST_WAITING = 10_000  # pieces of text
RETRY_S = 1.0


def reserve_standard_descriptors() -> None:
    """Put the null device in the place of what is closed, so that no file opened later is taken for it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


class Output:
    """Writes to a stream in a thread of its own. What finds no room is dropped and counted; nothing raises or waits."""

    def __init__(self, stream: TextIO | None) -> None:
        """`stream`: None, as Python has it for a closed one, or one without a descriptor, as a test's."""
        self._stream = stream
        self._waiting: queue.Queue[bytes | None] = queue.Queue(MOST_WAITING)
        self._dropped = 0
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        if self._stream is None:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="longlive-output", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(text.encode(errors="replace"))
        except queue.Full:
            self._dropped += 1

    def close(self, seconds: float = 1.0) -> None:
        """Give what waits so long to be written; then it is lost."""
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put_nowait(None)
                self._thread.join(seconds)
            self._thread = None

    def _run(self) -> None:
        while (data := self._waiting.get()) is not None:
            dropped, self._dropped = self._dropped, 0
            if dropped:
                data = b"(%d lines were dropped here: nobody read them)\n" % dropped + data
            with contextlib.suppress(OSError, ValueError):  # its reader has gone, or the disk under it is full
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
            except BlockingIOError:  # somebody has made it one that does not wait
                select.select([], [descriptor], [], RETRY_S)


class StandardOutputs:
    """What a command says to the person who started it."""

    def __init__(self) -> None:
        self._out, self._err = Output(sys.stdout), Output(sys.stderr)

    def say(self, text: str) -> None:
        """A result, to stdout."""
        self._out.write(text + "\n")

    def tell(self, text: str) -> None:
        """About the work, to stderr."""
        self._err.write(text + "\n")

    def close(self) -> None:
        self._out.close()
        self._err.close()
