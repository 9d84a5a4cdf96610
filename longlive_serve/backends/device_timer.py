# SPDX-License-Identifier: Apache-2.0
"""When a device did what, without waiting for it in between.

Used by the model runner, whose work on a GPU is queued long before it is done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Event = float | torch.cuda.Event


class DeviceTimer:
    """Marks points in the work of one device, and tells later how far apart they were."""

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")

    def record(self) -> Event:
        """The point where all work that has been queued so far is done."""
        if not self._on_cuda:
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self, record: Event) -> None:
        """Until that point."""
        if isinstance(record, torch.cuda.Event):
            record.synchronize()

    def seconds(self, begin: Event, end: Event) -> float:
        """From one mark to a later one; waits for it."""
        if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        assert isinstance(begin, float) and isinstance(end, float), "marks of two clocks"  # noqa: PT018
        return end - begin


def median_seconds(call: Callable[[], object], device: str, runs: int) -> float:
    """Of some runs, after one that compiles or loads the kernel."""
    timer, events = DeviceTimer(device), []
    for _ in range(runs + 1):
        begin = timer.record()
        call()
        events.append((begin, timer.record()))
    return statistics.median([timer.seconds(*pair) for pair in events][1:])
