# SPDX-License-Identifier: Apache-2.0
"""The server's figures as Triton's own metrics: `longlive_*` in its /metrics. Called by `model.py`, from one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlive_serve.observability.metrics import COUNTER, FAMILIES, Labels, MetricUpdate


class TritonMetrics:
    """One metric for every figure and its labels."""

    def __init__(self, metric_family: Any) -> None:
        """`metric_family`: the class of Triton's Python backend."""
        self._families = {  # kept: a family that is collected takes its metrics with it
            name: metric_family(
                name=f"longlive_{name}",
                description=family.description,
                kind=metric_family.COUNTER if family.kind == COUNTER else metric_family.GAUGE,
            )
            for name, family in FAMILIES.items()
        }
        self._metrics: dict[tuple[str, Labels], Any] = {}

    def publish(self, updates: Sequence[MetricUpdate]) -> None:
        for name, labels, value in updates:
            if (name, labels) not in self._metrics:
                self._metrics[name, labels] = self._families[name].Metric(labels=dict(labels))
            metric = self._metrics[name, labels]
            if FAMILIES[name].kind == COUNTER:
                metric.increment(value - metric.value())
            else:
                metric.set(value)
