# SPDX-License-Identifier: Apache-2.0
"""What the server tells about itself: figures, traces and log lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from longlive_serve.observability.log_setup import JsonLines, Lines
from longlive_serve.observability.metrics import BUCKETS_S, COUNTER, FAMILIES, Metrics
from longlive_serve.observability.tracing import Phase, Trace
from longlive_serve.observability.triton_metrics import TritonMetrics


def changed(metrics: Metrics) -> dict[Any, float]:
    return {(name, *(value for _, value in labels)): value for name, labels, value in metrics.collect_updates()}


def test_only_what_has_changed_is_told() -> None:
    metrics = Metrics()
    assert changed(metrics)["live_sessions",] == 0
    assert changed(metrics) == {}
    metrics.set("live_sessions", 2)
    metrics.set("waiting_sessions", 0)
    metrics.add("phase_seconds", 0.5, phase="decode")
    metrics.add("phase_seconds", 0.25, phase="decode")
    assert changed(metrics) == {("live_sessions",): 2, ("phase_seconds", "decode"): 0.75}


def test_a_histogram_counts_what_is_at_most_the_end_of_a_bucket() -> None:
    metrics = Metrics()
    for seconds in (0.05, 0.06, 100.0):
        metrics.observe("switch_seconds", seconds)
    figures = changed(metrics)
    buckets = [figures["switch_seconds_bucket", end] for end in (*map(str, BUCKETS_S), "+Inf")]
    assert buckets == [1, *[2] * (len(BUCKETS_S) - 1), 3]
    assert figures["switch_seconds_count",] == 3
    assert figures["switch_seconds_sum",] == pytest.approx(100.11)


class CountingFamily:
    """Triton's MetricFamily, as far as it is used."""

    COUNTER, GAUGE = "counter", "gauge"
    shown: dict[Any, float] = {}  # noqa: RUF012

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str]) -> Any:  # noqa: N802
        family, key = self, (self.name, *labels.values())

        class Metric:
            def value(self) -> float:
                return CountingFamily.shown.get(key, 0.0)

            def increment(self, by: float) -> None:
                assert family.kind == COUNTER
                CountingFamily.shown[key] = self.value() + by

            def set(self, value: float) -> None:
                assert family.kind != COUNTER, "Triton refuses that"
                CountingFamily.shown[key] = value

        return Metric()


def test_every_figure_becomes_a_metric_of_its_kind() -> None:
    metrics, triton = Metrics(), TritonMetrics(CountingFamily)
    for live in (3, 1):
        metrics.set("live_sessions", live)
        metrics.add("chunks", 2)
        metrics.set("info", 1, preset="demo")
        triton.publish(metrics.collect_updates())
    shown = CountingFamily.shown
    assert (shown["longlive_live_sessions",], shown["longlive_chunks",], shown["longlive_info", "demo"]) == (1, 4, 1)
    assert {name for name, *_ in shown} <= {f"longlive_{name}" for name in FAMILIES}


def test_a_trace_can_be_read_by_a_viewer(tmp_path: Path) -> None:
    trace = Trace("../../etc/a session")
    trace.add(Phase(name="chunk 0", start_time=2.0, seconds=0.5), "chunks", first_frame=0)
    path = trace.write(tmp_path / "traces")
    assert path == tmp_path / "traces/etcasession.json"
    (event,) = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert (event["ph"], event["ts"], event["dur"], event["tid"]) == ("X", 2e6, 0.5e6, "chunks")
    assert event["args"] == {"first_frame": 0}


def test_log_records_carry_their_session() -> None:
    record = logging.LogRecord("longlive", logging.WARNING, "", 0, "chunk %d came late", (3,), None)
    record.session = "abc"
    fields = json.loads(JsonLines().format(record))
    assert fields.items() >= {"level": "warning", "session": "abc", "message": "chunk 3 came late"}.items()
    assert Lines("%(message)s").format(record) == "chunk 3 came late (session abc)"
