# SPDX-License-Identifier: Apache-2.0
"""Who holds a slot and which session advances next. Integers and ids only, no torch, no clock.

Called by the service's worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Scheduler:
    """Slots are given in the order of arrival; sessions that hold one take turns, a chunk each."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots))[::-1]
        self._waiting: deque[str] = deque()
        self._slots: dict[str, int] = {}  # in the order of their turns

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def live(self) -> int:
        return len(self._slots)

    def add(self, session_id: str) -> None:
        """Queue a session for a slot."""
        self._waiting.append(session_id)

    def admit(self) -> list[tuple[str, int]]:
        """Give free slots to those who wait longest; returns who got which."""
        admitted = []
        while self._free and self._waiting:
            session_id, slot = self._waiting.popleft(), self._free.pop()
            self._slots[session_id] = slot
            admitted.append((session_id, slot))
        return admitted

    def next(self, has_work: Callable[[str], bool]) -> str | None:
        """The session whose turn it is among those that have work; it then goes to the end of the line."""
        for session_id in self._slots:
            if has_work(session_id):
                self._slots[session_id] = self._slots.pop(session_id)
                return session_id
        return None

    def remove(self, session_id: str) -> None:
        """Forget a session, wherever it stands, and free its slot."""
        if session_id in self._slots:
            self._free.append(self._slots.pop(session_id))
        elif session_id in self._waiting:
            self._waiting.remove(session_id)
