# SPDX-License-Identifier: Apache-2.0
"""Runs a trace under a policy and computes its metrics. Called by the command line, the sweep and the tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from deploy.autoscaling_simulator.arrivals import HOUR, TRACES, Arrivals
from deploy.autoscaling_simulator.cluster import Cluster, Sample
from deploy.autoscaling_simulator.fleet import Fleet
from deploy.autoscaling_simulator.policy import Policy
from deploy.autoscaling_simulator.report.session_stats import CAUSES
from deploy.autoscaling_simulator.sim_config import SimConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationResult:
    metrics: dict[str, Any]
    samples: Sequence[Sample]
    """One per sync period of the autoscaler."""
    capacity: int


def simulate(
    trace: str,
    *,
    config: SimConfig,
    policy: Policy,
    peak: float,
    seed: int,
    on_round: Callable[[float], None] = lambda now: None,
) -> SimulationResult:
    """`peak`: expected live sessions at the peak. `on_round`: called with the time in the trace, in seconds."""
    arrivals = Arrivals(TRACES[trace], config, peak, seed)
    fleet = Fleet(config, policy.service, arrivals, seed)
    cluster = Cluster(config, policy, fleet, seed)
    cluster.run(arrivals.seconds, arrivals.live_at_first, on_round)
    return SimulationResult(
        metrics=_metrics(trace, arrivals, fleet, cluster), samples=cluster.samples, capacity=config.capacity
    )


def with_enough_replicas(policy: Policy, peak: float, capacity: int) -> Policy:
    """The policy with `max_replicas` raised so that it never limits a fleet with this peak."""
    needed = math.ceil(2 * peak / (capacity * policy.target_busy_share))
    return dataclasses.replace(policy, max_replicas=max(policy.max_replicas, needed))


def _metrics(trace: str, arrivals: Arrivals, fleet: Fleet, cluster: Cluster) -> dict[str, Any]:
    stats, hours = fleet.stats, arrivals.seconds / HOUR
    gpu_hours = fleet.gpu_seconds(arrivals.seconds) / HOUR
    perfect = arrivals.offered_s / fleet.capacity / HOUR
    peak_pods = max(sample.pods for sample in cluster.samples)
    return {
        "hours": hours,
        "arrived": stats.arrived,
        "live_at_the_beginning": stats.already_live,
        "completed": stats.completed,
        "live_at_the_end": fleet.live,
        "waiting_at_the_end": fleet.queued + fleet.num_disconnected,
        "at_once_share": stats.at_once / stats.arrived if stats.arrived else 0.0,
        "wait_p50_s": stats.wait(50),
        "wait_p95_s": stats.wait(95),
        "wait_p99_s": stats.wait(99),
        "refused": stats.refused,
        "refused_share": stats.refused / stats.arrived if stats.arrived else 0.0,
        "stalls": stats.stalls.total(),
        "stalls_by_cause": {cause: stats.stalls[cause] for cause in CAUSES},
        "moved_by_cause": {cause: stats.moved[cause] for cause in CAUSES},
        "lost": stats.lost,
        "longest_gap_s": stats.longest_gap_s,
        "pods_failed": cluster.failures,
        "pods_drained": cluster.drained,
        "peak_live": max(sample.live for sample in cluster.samples),
        "peak_pods": peak_pods,
        "gpu_hours": gpu_hours,
        "perfect_gpu_hours": perfect,
        "gpu_hours_by_perfect": gpu_hours / perfect,
        "fixed_gpu_hours": peak_pods * hours,
    }
