# SPDX-License-Identifier: Apache-2.0
"""Times the work of a device without synchronizing in between.

Used by the model runner, whose work on a GPU is queued long before it runs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Event = float | torch.cuda.Event


class DeviceTimer:
    """Records events in the work of one device, and measures the time between them later."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")

    def record(self) -> Event:
        """Record an event that completes when all work queued so far is done."""
        if not self._on_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, record: Event) -> None:
        """Wait for the event."""
        if isinstance(record, torch.cuda.Event):
            record.synchronize()

    def seconds(self, begin: Event, end: Event) -> float:
        """Seconds from one event to a later one; waits for the later one."""
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        assert isinstance(begin, float) and isinstance(end, float), "marks of two clocks"  # noqa: PT018
        return end - begin


def median_seconds(call: Callable[[], object], device: str, runs: int) -> float:
    """Median time of `runs` calls, after one warm-up call that compiles or loads the kernel."""
    timer, events = DeviceTimer(device), []
    for _ in range(runs + 1):
        begin = timer.record()
        call()
        events.append((begin, timer.record()))
    return statistics.median([timer.seconds(*pair) for pair in events][1:])
