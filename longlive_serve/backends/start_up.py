# SPDX-License-Identifier: Apache-2.0
"""Measures the time of each phase of a start.

The caller that starts a model runner enters `measure_start`; `phase` marks the functions it calls. Outside of a start,
`phase` does nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

IMPORT, LOAD, COMPILE, CHOOSE, CAPTURE, WARM_UP = "import", "load", "compile", "choose", "capture", "warm_up"
PHASES = (IMPORT, LOAD, COMPILE, CHOOSE, CAPTURE, WARM_UP)
"""Python and the first imports; loading weights, with the imports for it; compiling kernels and cuDNN plans; choosing
kernels by measurement; capturing CUDA graphs; generating warm-up videos. Each phase excludes the phases inside it."""


class StartTimer:
    """Seconds by phase. Belongs to one thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = [0.0]
        """For every open phase, the seconds of the phases inside it."""

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            self.seconds[name] += elapsed - self._inner.pop()
            self._inner[-1] += elapsed

    def add(self, name: str, seconds: float) -> None:
        """Move `seconds` of the open phase to the phase `name`."""
        self.seconds[name] += seconds
        self._inner[-1] += seconds


_timer: ContextVar[StartTimer | None] = ContextVar("start_timer", default=None)


@contextlib.contextmanager
def measure_start() -> Iterator[dict[str, float]]:
    """Yields the seconds of each of PHASES; they are complete on exit."""
    timer = StartTimer()
    token = _timer.set(timer)
    try:
        yield timer.seconds
    finally:
        _timer.reset(token)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Count the time inside as the phase `name` of the current `measure_start`, if any. Also a decorator."""
    timer = _timer.get()
    with contextlib.nullcontext() if timer is None else timer.phase(name):
        yield


def note_compilations() -> None:
    """Measure Triton's compilations, which happen at a kernel's first launch."""
    from triton import knobs

    knobs.compilation.listener = _compiled


def _compiled(*, times: Any, **_: Any) -> None:
    timer = _timer.get()
    if timer is not None:
        timer.add(COMPILE, times.total / 1e6)  # microseconds


def process_age() -> float:
    """Seconds since this process started."""
    started_ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])  # since boot; see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def describe(seconds: Mapping[str, float]) -> str:
    """The phases that took a tenth of a second or more, as text."""
    return ", ".join(f"{name.replace('_', '-')} {took:.1f} s" for name, took in seconds.items() if took >= 0.05)
