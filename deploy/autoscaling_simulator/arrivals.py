# SPDX-License-Identifier: Apache-2.0
"""Arrival times and lengths of sessions: three traces, scaled to a peak of live sessions.

A Poisson process whose rate changes every second. Does not know pods.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from deploy.autoscaling_simulator.sim_config import SimConfig

Array = npt.NDArray[np.float64]
MINUTE, HOUR = 60, 3600
STEP = 10  # seconds, resolution of computations on whole traces


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    name: str
    hours: float
    description: str
    shape: Callable[[Array, np.random.Generator], Array]
    """Relative arrival rate at times, in seconds. Before 0 it equals the rate at 0."""

    @property
    def seconds(self) -> int:
        return round(self.hours * HOUR)


def _diurnal(times: Array, random: np.random.Generator) -> Array:
    """A day from midnight: a plateau in the afternoon, a peak in the evening, and a sixth of the peak at night."""
    hours = times / HOUR

    def bump(middle: float, width: float) -> Array:
        apart = (hours - middle + 12) % 24 - 12
        return np.asarray(np.exp(-0.5 * (apart / width) ** 2))

    return 0.2 + 0.45 * bump(14, 3.5) + 0.95 * bump(20.5, 2.2)


def _burst(times: Array, random: np.random.Generator) -> Array:
    """A constant rate with three bursts per two hours; each rises within a minute and halves every five minutes."""
    rate = np.full(len(times), 0.4)
    starts = np.cumsum(random.exponential(40 * MINUTE, 100))
    for start, height in zip(starts, random.uniform(0.1, 0.6, 100), strict=True):
        since = times - start
        rise = np.clip(since / MINUTE, 0, 1)
        rate += height * rise * 0.5 ** (np.maximum(since, 0) / (5 * MINUTE))
    return rate


def _flash_crowd(times: Array, random: np.random.Generator) -> Array:
    """The rate rises to 20 times within a minute, for an hour."""
    start, end = 20 * MINUTE, 80 * MINUTE
    return np.interp(times, [0, start, start + MINUTE, end, end + 10 * MINUTE], [1, 1, 20, 20, 1])


TRACES = {
    trace.name: trace
    for trace in (
        Trace(
            name="diurnal", hours=24, description="a day: six times as many in the evening as at night", shape=_diurnal
        ),
        Trace(name="burst", hours=6, description="bursts, each up within a minute", shape=_burst),
        Trace(name="flash_crowd", hours=2.5, description="20 times as many within a minute", shape=_flash_crowd),
    )
}


class Arrivals:
    """The sessions of a trace, in order of arrival."""

    def __init__(self, trace: Trace, config: SimConfig, peak: float, seed: int) -> None:
        """`peak`: maximum over time of the expected live sessions, if all were served immediately."""
        self._random = np.random.default_rng(np.random.SeedSequence([seed, *trace.name.encode()]))
        self._config, self.seconds = config, trace.seconds
        shape = trace.shape(np.arange(trace.seconds, dtype=float), self._random)
        self._rates = shape * (peak / offered_live(shape, config).max())
        """Sessions per second, by second."""
        self.live_at_first = float(self._rates[0]) * config.mean_session_s
        """Expected live sessions at the start of the trace."""
        self.offered_s = 0.0
        """Seconds of video within the trace that were requested so far."""
        self._start_s = 0
        self._times: list[float] = []
        self._lengths: list[float] = []

    def already_live(self) -> list[float]:
        """Remaining lengths of the sessions that are live at the start."""
        config = self._config
        count = self._random.poisson(self.live_at_first)
        # Live sessions are sampled with a probability proportional to their length, at a uniformly distributed age.
        mean = math.log(config.session_median_s) + config.session_sigma**2
        remaining = self._random.lognormal(mean, config.session_sigma, count) * self._random.random(count)
        self.offered_s += float(np.minimum(remaining, self.seconds).sum())
        return list(remaining.tolist())

    def until(self, end: float) -> tuple[list[float], list[float]]:
        """Arrival times and lengths of the sessions since the last call."""
        while self._start_s < min(end, self.seconds):
            self._generate_minute()
        cut = bisect.bisect_right(self._times, end)
        times, self._times = self._times[:cut], self._times[cut:]
        lengths, self._lengths = self._lengths[:cut], self._lengths[cut:]
        return times, lengths

    def _generate_minute(self) -> None:
        start, random, config = self._start_s, self._random, self._config
        rates = self._rates[start : start + MINUTE]
        counts = random.poisson(rates)
        times = np.sort(np.repeat(np.arange(start, start + len(rates)), counts) + random.random(counts.sum()))
        lengths = random.lognormal(math.log(config.session_median_s), config.session_sigma, len(times))
        self.offered_s += float(np.minimum(lengths, self.seconds - times).sum())
        self._times += times.tolist()
        self._lengths += lengths.tolist()
        self._start_s += MINUTE


def offered_live(rates: Array, config: SimConfig) -> Array:
    """Expected live sessions if all were served immediately, every `STEP` seconds."""
    downsampled = rates[::STEP]
    ages = np.arange(len(downsampled)) * STEP + STEP / 2
    survives = np.array([_survival(age, config) for age in ages])
    size = 2 * len(downsampled)
    since_begin = (
        np.fft.irfft(np.fft.rfft(downsampled, size) * np.fft.rfft(survives, size), size)[: len(downsampled)] * STEP
    )
    # Sessions from before the start: the steady state, minus those that have ended since.
    before = downsampled[0] * (config.mean_session_s - np.cumsum(survives) * STEP)
    return np.asarray(since_begin + np.maximum(before, 0))


def _survival(age: float, config: SimConfig) -> float:
    """Share of the sessions that last longer than `age`."""
    return 0.5 * math.erfc(math.log(age / config.session_median_s) / (config.session_sigma * math.sqrt(2)))
