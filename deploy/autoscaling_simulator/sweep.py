# SPDX-License-Identifier: Apache-2.0
"""Justifies the shipped thresholds: varies each on small fleets, with several seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from deploy.autoscaling_simulator.policy import Policy
from deploy.autoscaling_simulator.report.simulate import simulate, with_enough_replicas
from deploy.autoscaling_simulator.sim_config import SimConfig

TARGETS = (0.6, 0.7, 0.8, 0.9)
SPARES = (0, 3, 6)
PEAKS = (100, 3000)
"""Sessions: a fleet with large and one with small random fluctuations."""
SEEDS = (0, 1, 2, 3)
WINDOWS = (0, 60, 120, 300)
GRACES = (0, 300, 600, 1200)
GOODBYES = (0, 1, 2)
DAY_PEAK = 1000
ATTEMPTS = (1, 2, 4, 8, 16, 32)
CAPACITIES = (1, 2, 3)
TABLES = ("headroom", "refused", "drain", "max_attempts")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    table: str
    trace: str
    peak: int
    policy: Policy
    overrides: dict[str, Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Overrides of the SimConfig."""


def cases(policy: Policy) -> Iterator[Case]:
    """All cases, table by table."""
    for target in TARGETS:
        for spare in SPARES:
            for peak in PEAKS:
                changed = dataclasses.replace(policy, target_busy_share=target, spare_pods=spare)
                overrides = {"target_busy_share": target, "spare_pods": spare, "peak_sessions": peak}
                yield Case(table="headroom", trace="burst", peak=peak, policy=changed, overrides=overrides)
    for window in WINDOWS:
        changed = dataclasses.replace(policy, refused_window_s=window)
        overrides = {"refused_window_s": window}
        yield Case(table="refused", trace="flash_crowd", peak=PEAKS[-1], policy=changed, overrides=overrides)
    for chunks in GOODBYES:
        for grace in GRACES:
            changed = dataclasses.replace(policy, drain=dataclasses.replace(policy.drain, grace_period_s=grace))
            config: dict[str, Any] = {"goodbye_chunks": chunks}
            overrides = config | {"grace_period_s": grace}
            yield Case(
                table="drain", trace="diurnal", peak=DAY_PEAK, policy=changed, overrides=overrides, config=config
            )
    for max_attempts in ATTEMPTS:
        changed = dataclasses.replace(policy, service=dataclasses.replace(policy.service, max_attempts=max_attempts))
        for trace, peak in (("diurnal", DAY_PEAK), ("burst", PEAKS[-1])):
            for room in CAPACITIES:
                config = {"capacity": room}
                overrides = config | {"max_attempts": max_attempts, "trace": trace}
                yield Case(
                    table="max_attempts", trace=trace, peak=peak, policy=changed, overrides=overrides, config=config
                )


def run(
    policy: Policy,
    config: SimConfig,
    target: Collection[str] = TABLES,
    seeds: Sequence[int] = SEEDS,
    on_case: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows by table, for the tables in `target`."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for case in (case for case in cases(policy) if case.table in target):
        tables.setdefault(case.table, []).append(_row(case, config, seeds))
        on_case()
    return tables


def _row(case: Case, config: SimConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """One case: sums over its seeds, and the longest waits."""
    config = dataclasses.replace(config, **case.config)
    policy = with_enough_replicas(case.policy, case.peak, config.capacity)
    runs = [simulate(case.trace, config=config, policy=policy, peak=case.peak, seed=seed).metrics for seed in seeds]
    return {
        **case.overrides,
        "wait_p95_s": max(run["wait_p95_s"] for run in runs),
        "wait_p99_s": max(run["wait_p99_s"] for run in runs),
        "refused_share": sum(run["refused"] for run in runs) / sum(run["arrived"] for run in runs),
        "moved": sum(run["moved_by_cause"]["scale_down"] for run in runs),
        "stalls": sum(run["stalls_by_cause"]["scale_down"] for run in runs),
        "gpu_hours_by_perfect": statistics.mean(run["gpu_hours_by_perfect"] for run in runs),
    }
