# SPDX-License-Identifier: Apache-2.0
"""Runs a trace under a policy and sums it up in figures. Called by the command line, the sweep and the tests."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from deploy.autoscaling_simulator.arrivals import HOUR, TRACES, Arrivals
from deploy.autoscaling_simulator.cluster import Cluster, Moment
from deploy.autoscaling_simulator.fleet import Fleet
from deploy.autoscaling_simulator.policy import Policy
from deploy.autoscaling_simulator.report.tally import CAUSES
from deploy.autoscaling_simulator.world import World


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    figures: dict[str, Any]
    moments: Sequence[Moment]
    """Every round of the autoscaler."""
    capacity: int


def simulate(
    trace: str,
    *,
    world: World,
    policy: Policy,
    peak: float,
    seed: int,
    on_round: Callable[[float], None] = lambda now: None,
) -> Run:
    """`peak`: the most sessions that are wanted at once, on average. `on_round`: is told the time in the trace."""
    arrivals = Arrivals(TRACES[trace], world, peak, seed)
    fleet = Fleet(world, policy.service, arrivals, seed)
    cluster = Cluster(world, policy, fleet, seed)
    cluster.run(arrivals.seconds, arrivals.live_at_first, on_round)
    return Run(figures=_figures(trace, arrivals, fleet, cluster), moments=cluster.moments, capacity=world.capacity)


def with_room(policy: Policy, peak: float, capacity: int) -> Policy:
    """The policy for a peak that its `max_replicas` is not made for: so many that they are never the limit."""
    needed = math.ceil(2 * peak / (capacity * policy.target_busy_share))
    return dataclasses.replace(policy, max_replicas=max(policy.max_replicas, needed))


def _figures(trace: str, arrivals: Arrivals, fleet: Fleet, cluster: Cluster) -> dict[str, Any]:
    tally, hours = fleet.tally, arrivals.seconds / HOUR
    gpu_hours = fleet.gpu_seconds(arrivals.seconds) / HOUR
    perfect = arrivals.offered_s / fleet.capacity / HOUR
    peak_pods = max(moment.pods for moment in cluster.moments)
    return {
        "hours": hours,
        "arrived": tally.arrived,
        "live_at_the_beginning": tally.already_live,
        "completed": tally.completed,
        "live_at_the_end": fleet.live,
        "waiting_at_the_end": fleet.waiting + fleet.adrift,
        "at_once_share": tally.at_once / tally.arrived if tally.arrived else 0.0,
        "wait_p50_s": tally.wait(50),
        "wait_p95_s": tally.wait(95),
        "wait_p99_s": tally.wait(99),
        "refused": tally.refused,
        "refused_share": tally.refused / tally.arrived if tally.arrived else 0.0,
        "stalls": tally.stalls.total(),
        "stalls_by_cause": {cause: tally.stalls[cause] for cause in CAUSES},
        "moved_by_cause": {cause: tally.moved[cause] for cause in CAUSES},
        "lost": tally.lost,
        "longest_gap_s": tally.longest_gap_s,
        "pods_failed": cluster.failures,
        "pods_drained": cluster.drained,
        "peak_live": max(moment.live for moment in cluster.moments),
        "peak_pods": peak_pods,
        "gpu_hours": gpu_hours,
        "perfect_gpu_hours": perfect,
        "gpu_hours_by_perfect": gpu_hours / perfect,
        "fixed_gpu_hours": peak_pods * hours,
    }
