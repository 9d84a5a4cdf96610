# SPDX-License-Identifier: Apache-2.0
"""Exports the server's metrics through Triton, as `longlive_*` in /metrics. Called by `model.py`, in one thread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from longlive_serve.observability.metrics import COUNTER, FAMILIES, Labels, MetricUpdate


class TritonMetrics:
    """A Triton metric for each metric and combination of labels."""

    def __init__(self, metric_family: Any) -> None:
        """`metric_family`: the class of Triton's Python backend."""
        self._families = {  # keep a reference: collecting a family destroys its metrics
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
