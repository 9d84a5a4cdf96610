# SPDX-License-Identifier: Apache-2.0
"""Where requests wait for the engine core's worker: put in by any thread, taken out by one."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from longlive_serve.engine.client_stream import ResponseSender
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import Request


class Mailbox:
    """Requests, or the errors that stand in their place, each with the sender for its answer."""

    def __init__(self) -> None:
        self._entries: queue.SimpleQueue[tuple[Request | RequestError, ResponseSender] | None] = queue.SimpleQueue()

    def put(self, request: Request | RequestError, sender: ResponseSender) -> None:
        self._entries.put((request, sender))

    def wake(self) -> None:
        """Make `take_all` return though nothing has come."""
        self._entries.put(None)

    def empty(self) -> bool:
        return self._entries.empty()

    def take_all(self, timeout: float | None) -> Iterator[tuple[Request | RequestError, ResponseSender]]:
        """All that has come; when nothing has, wait up to `timeout` seconds (None: for ever) for something."""
        try:
            entry = self._entries.get(timeout != 0.0, timeout)
            while True:
                if entry is not None:
                    yield entry
                entry = self._entries.get_nowait()
        except queue.Empty:
            return
