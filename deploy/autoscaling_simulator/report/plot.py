# SPDX-License-Identifier: Apache-2.0
"""Plots runs, one column per trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.autoscaling_simulator.arrivals import HOUR, MINUTE, TRACES
from deploy.autoscaling_simulator.cluster import Sample
from deploy.autoscaling_simulator.report.simulate import SimulationResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 400  # per line of a rate


def plot(runs: Mapping[str, SimulationResult], path: Path) -> None:
    """Write a PNG: slots and sessions, rates of arrivals and refusals, waiting sessions."""
    from matplotlib.figure import Figure  # of the extra `deploy`

    figure = Figure(figsize=(4.8 * len(runs), 7.5), layout="constrained")
    columns = figure.subplots(3, len(runs), sharex="col", squeeze=False, height_ratios=(3, 2, 1.3)).T
    for axes, (name, run) in zip(columns, runs.items(), strict=True):
        _choose_pod(axes, name, run)
    for axes, label in zip(columns[0], ("sessions, slots", "viewers per second", "waiting for a slot"), strict=True):
        axes.set_ylabel(label)
    pods = columns[-1][0].secondary_yaxis("right", functions=_slots_to_pods(next(iter(runs.values())).capacity))
    pods.set_ylabel("pods")
    for axes in columns[0][:2]:
        axes.legend(fontsize="small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _choose_pod(axes: Sequence[Axes], name: str, run: SimulationResult) -> None:
    sessions, rates, queue = axes
    samples, long = run.samples, TRACES[name].hours > 4
    unit = HOUR if long else MINUTE
    times = [sample.time / unit for sample in samples]
    sessions.set_title(f"{name}\n{TRACES[name].description}", fontsize="medium")
    slots, ready = ([getattr(sample, field) * run.capacity for sample in samples] for field in ("pods", "ready"))
    sessions.fill_between(times, slots, color="tab:orange", alpha=0.25, lw=0, label="slots of all pods")
    sessions.plot(times, ready, color="tab:orange", lw=1.2, label="slots of ready pods")
    sessions.plot(times, [sample.live for sample in samples], color="tab:blue", lw=1.2, label="live")
    for field, label, color in (("arrived", "arrivals", "tab:blue"), ("refused", "refused", "tab:red")):
        downsampled = samples[:: max(1, len(samples) // POINTS)]
        rates.plot(
            [sample.time / unit for sample in downsampled[1:]],
            _per_second(downsampled, field),
            color,
            lw=1.2,
            label=label,
        )
    queue.plot(times, [sample.queued for sample in samples], color="tab:purple", lw=1.2)
    queue.set_xlabel("hours" if long else "minutes")
    for one in axes:
        one.set_xlim(0, times[-1])
        one.set_ylim(0, max(1, one.get_ylim()[1]))
        one.grid(alpha=0.3)
        one.yaxis.set_major_formatter("{x:,g}")


def _slots_to_pods(capacity: int) -> tuple[Callable[[float], float], Callable[[float], float]]:
    return lambda slots: slots / capacity, lambda pods: pods * capacity


def _per_second(samples: Sequence[Sample], field: str) -> list[float]:
    pairs = pairwise((sample.time, getattr(sample, field)) for sample in samples)
    return [(after - before) / (end - start) for (start, before), (end, after) in pairs]
