# SPDX-License-Identifier: Apache-2.0
"""A chunk that was launched on the device and whose output is not collected yet.

Created and collected by the model runner; the engine core holds one while it launches the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from longlive_serve.backends.device import AsyncD2HCopy
from longlive_serve.backends.device_timer import DeviceTimer, Event
from longlive_serve.observability.tracing import Phase


class Phases:
    """Timings of one chunk's phases, beginning with the KV-cache update of the previous chunk. Only `until` waits for
    the device."""

    def __init__(self, timer: DeviceTimer) -> None:
        self._timer = timer
        self._events: list[tuple[str, Event, Event]] = []

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Time the work in the block as phase `name`."""
        begin = self._timer.record()
        yield
        self._events.append((name, begin, self._timer.record()))

    def until(self, now: float) -> list[Phase]:
        """All phases. The last one ended at `now` (monotonic seconds)."""
        seconds, (_, _, last) = self._timer.seconds, self._events[-1]
        return [
            Phase(name=name, start_time=now - seconds(begin, last), seconds=seconds(begin, end))
            for name, begin, end in self._events
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InflightChunk:
    """A launched chunk of a session."""

    frames: Iterator[AsyncD2HCopy]
    """One copy for each part."""
    parts: int
    first_frame: int
    prompt_index: int
    notice: str
    start_time: float
    """When its launch began (monotonic seconds)."""
    denoised: Event
    """Recorded after denoising; decoding and the KV-cache update follow."""
    phases: Phases
