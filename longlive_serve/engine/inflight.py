# SPDX-License-Identifier: Apache-2.0
"""A chunk that the device has been given and that nobody has seen yet.

Made and finished by the model runner; the engine core holds one while it launches the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from longlive_serve.backends.device import AsyncD2HCopy
from longlive_serve.backends.device_timer import DeviceTimer, Event
from longlive_serve.observability.tracing import Phase


class Phases:
    """What takes how long in one chunk, the KV-cache update of the one before first; the device is not waited for
    until somebody asks."""

    def __init__(self, timer: DeviceTimer) -> None:
        self._timer = timer
        self._events: list[tuple[str, Event, Event]] = []

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """What is done within counts as `name`."""
        begin = self._timer.record()
        yield
        self._events.append((name, begin, self._timer.record()))

    def until(self, now: float) -> list[Phase]:
        """All of them, the last of which has just ended, at `now` (monotonic seconds)."""
        seconds, (_, _, last) = self._timer.seconds, self._events[-1]
        return [
            Phase(name=name, start_time=now - seconds(begin, last), seconds=seconds(begin, end))
            for name, begin, end in self._events
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InflightChunk:
    """A session's chunk on its way."""

    frames: Iterator[AsyncD2HCopy]
    """In parts."""
    parts: int
    first_frame: int
    prompt_index: int
    notice: str
    start_time: float
    """When the host began with it (monotonic seconds)."""
    denoised: Event
    """Then only the decoding and the KV-cache update are left."""
    phases: Phases
