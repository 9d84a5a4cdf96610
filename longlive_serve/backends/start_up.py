# SPDX-License-Identifier: Apache-2.0
"""Where the seconds of a start go, by phase.

Whoever starts a model runner enters `measure_start`; the functions that it calls are marked with `phase`. Outside of a
start, `phase` does nothing.
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
"""Python and the packages that come first; weights, and the packages for them; kernels and cuDNN plans; kernels timed
against each other; CUDA graphs; videos that nobody sees. Each without those that it contains."""


class StartTimer:
    """Seconds by phase. Belongs to one thread."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._inner = [0.0]
        """Of every phase that is open, the seconds of those within it."""

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
        """Seconds of the phase that is open, which belong to another one."""
        self.seconds[name] += seconds
        self._inner[-1] += seconds


_timer: ContextVar[StartTimer | None] = ContextVar("start_timer", default=None)


@contextlib.contextmanager
def measure_start() -> Iterator[dict[str, float]]:
    """Gives the seconds of each of PHASES; they are complete on exit."""
    timer = StartTimer()
    token = _timer.set(timer)
    try:
        yield timer.seconds
    finally:
        _timer.reset(token)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What runs within belongs to the phase `name` of the start that is measured, if one is. Decorates functions."""
    timer = _timer.get()
    with contextlib.nullcontext() if timer is None else timer.phase(name):
        yield


def note_compilations() -> None:
    """From now on Triton says how long it compiles, which happens at a kernel's first launch."""
    from triton import knobs

    knobs.compilation.listener = _compiled


def _compiled(*, times: Any, **_: Any) -> None:
    timer = _timer.get()
    if timer is not None:
        timer.add(COMPILE, times.total / 1e6)  # microseconds


def process_age() -> float:
    """Seconds since this process began."""
    started_ticks = int(Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[19])  # since boot; see proc(5)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks / os.sysconf("SC_CLK_TCK")


def describe(seconds: Mapping[str, float]) -> str:
    """The phases that took a tenth of a second or more, as text."""
    return ", ".join(f"{name.replace('_', '-')} {took:.1f} s" for name, took in seconds.items() if took >= 0.05)
