# SPDX-License-Identifier: Apache-2.0
"""Where requests wait for the service's worker: put in by any thread, taken out by one."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from longlive_serve.engine.client_stream import ResponseSender
from longlive_serve.protocol.errors import ServeError
from longlive_serve.protocol.messages import Request


class Mailbox:
    """Requests, or the errors that stand in their place, each with the sink for its answer."""

    def __init__(self) -> None:
        self._letters: queue.SimpleQueue[tuple[Request | ServeError, ResponseSender] | None] = queue.SimpleQueue()

    def put(self, request: Request | ServeError, sender: ResponseSender) -> None:
        self._letters.put((request, sender))

    def wake(self) -> None:
        """Make `take_all` return though nothing has come."""
        self._letters.put(None)

    def empty(self) -> bool:
        return self._letters.empty()

    def take_all(self, timeout: float | None) -> Iterator[tuple[Request | ServeError, ResponseSender]]:
        """All that has come; when nothing has, wait up to `timeout` seconds (None: for ever) for something."""
        try:
            letter = self._letters.get(timeout != 0.0, timeout)
            while True:
                if letter is not None:
                    yield letter
                letter = self._letters.get_nowait()
        except queue.Empty:
            return
