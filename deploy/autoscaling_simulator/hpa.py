# SPDX-License-Identifier: Apache-2.0
"""Computes the number of replicas like Kubernetes' HorizontalPodAutoscaler (autoscaling/v2).

Called by the cluster in every sync period. Pure arithmetic: no pods and no clock; times in seconds are arguments.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence

from deploy.autoscaling_simulator.policy import PERCENT, Direction, Policy, Rate

ROUNDING = 1e-9  # Kubernetes uses integer milli-units


def desired_by_metric(current: int, metric: float, target: float, tolerance: float) -> int:
    """Replicas for one metric; `current` if the metric is within the tolerance of its target."""
    ratio = metric / target
    return current if abs(ratio - 1) <= tolerance else math.ceil(current * ratio - ROUNDING)


class Autoscaler:
    """Combines the two metrics, the stabilization windows and the rate limits."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._recommendations: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()
        self._history = max(_history_of(policy.scale_up), _history_of(policy.scale_down))

    def desired(self, now: float, current: int, busy_share: float, late_share: float) -> int:
        """The number of replicas from `now` on."""
        policy = self._policy
        if not self._recommendations:
            self._recommendations.append((now, current))
        target = max(
            desired_by_metric(current, busy_share, policy.target_busy_share, policy.tolerance),
            desired_by_metric(current, late_share, policy.target_late_share, policy.tolerance),
        )
        replicas = self._limit_rates(now, current, self._stabilize(now, current, target))
        replicas = min(max(replicas, policy.min_replicas), policy.max_replicas)
        if replicas != current:
            self._changes.append((now, replicas - current))
        return replicas

    def _stabilize(self, now: float, current: int, target: int) -> int:
        """Limit growth to the minimum, shrinkage to the maximum recommendation within the direction's window."""
        recommendations, policy = self._recommendations, self._policy
        least = min([target, *_values_since(recommendations, now - policy.scale_up.stabilization_s)])
        most = max([target, *_values_since(recommendations, now - policy.scale_down.stabilization_s)])
        recommendations.append((now, target))
        _drop_before(recommendations, now - self._history)
        return min(max(current, least), most)

    def _limit_rates(self, now: float, current: int, target: int) -> int:
        up, down = self._policy.scale_up.policies, self._policy.scale_down.policies
        _drop_before(self._changes, now - self._history)
        if target > current and up:
            limits = [_upper_limit(rate, self._count_at_start(rate, now, current)) for rate in up]
            return min(target, max(current, *limits))
        if target < current and down:
            limits = [_lower_limit(rate, self._count_at_start(rate, now, current)) for rate in down]
            return max(target, min(current, *limits))
        return target

    def _count_at_start(self, rate: Rate, now: float, current: int) -> int:
        """Replicas at the start of the rate's period."""
        return current - sum(_values_since(self._changes, now - rate.period_s))


def _upper_limit(rate: Rate, before: int) -> int:
    return -(-before * (100 + rate.value) // 100) if rate.type == PERCENT else before + rate.value


def _lower_limit(rate: Rate, before: int) -> int:
    return before * (100 - rate.value) // 100 if rate.type == PERCENT else before - rate.value


def _history_of(direction: Direction) -> float:
    return max([direction.stabilization_s, *(rate.period_s for rate in direction.policies)])


def _values_since(entries: Sequence[tuple[float, int]] | deque[tuple[float, int]], start: float) -> Iterable[int]:
    return [value for time, value in entries if time > start]


def _drop_before(entries: deque[tuple[float, int]], start: float) -> None:
    while entries and entries[0][0] <= start:
        entries.popleft()
