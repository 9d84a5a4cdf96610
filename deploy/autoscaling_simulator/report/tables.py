# SPDX-License-Identifier: Apache-2.0
"""Formats a record as the tables of docs/capacity.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import format_table, markdown_table
from deploy.autoscaling_simulator.arrivals import TRACES

SECTION = "deploy.autoscaling_simulator"
WAITS = "{wait_p95_s:.0f} / {wait_p99_s:.0f} s"
GPU_HOURS = "{gpu_hours_by_perfect:.2f}"
TRACE_ROWS = {
    "viewers who come": "{arrived:,}",
    "live at the beginning": "{live_at_the_beginning:,}",
    "a slot at once": "{at_once_share:.2%}",
    "wait p50 / p95 / p99": "{wait_p50_s:.1f} / {wait_p95_s:.1f} / {wait_p99_s:.1f} s",
    "refused": "{refused:,} ({refused_share:.2%})",
    "moved / stalls: pod failed": "{moved_by_cause[pod_failure]:,} / {stalls_by_cause[pod_failure]:,}",
    "moved / stalls: scaled down": "{moved_by_cause[scale_down]:,} / {stalls_by_cause[scale_down]:,}",
    "lost": "{lost:,}",
    "pods that failed": "{pods_failed:,}",
    "peak of live sessions": "{peak_live:,}",
    "peak of pods": "{peak_pods:,}",
    "GPU-hours": "{gpu_hours:,.0f}",
    "of a perfect fleet": "{perfect_gpu_hours:,.0f}",
    "of a fixed fleet": "{fixed_gpu_hours:,.0f}",
}


def trace_table(record: Mapping[str, Any]) -> str:
    """Metrics of the traces, one column per trace."""
    traces = [name for name in TRACES if name in record]
    rows = ((title, *(cell.format_map(record[name]) for name in traces)) for title, cell in TRACE_ROWS.items())
    return markdown_table(("trace", *traces), rows)


def sweep_tables(sweep: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Results with other thresholds."""
    tables = {"headroom": _headroom, "refused": _refused, "drain": _drain, "max_attempts": _max_attempts}
    return "\n\n".join(tables[name](rows) for name, rows in sweep.items())


def _headroom(rows: Sequence[Mapping[str, Any]]) -> str:
    keys = {"target busy share": "{target_busy_share:g}", "spare pods": "{spare_pods}"}
    cells = {
        "{peak_sessions} sessions: refused": "{refused_share:.2%}",
        "wait p95 / p99": WAITS,
        "GPU-hours by perfect": GPU_HOURS,
    }
    return _pivot(rows, keys, cells)


def _refused(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "refused viewers count as demand for": "{window}",
        "refused": "{refused_share:.1%}",
        "wait p99": "{wait_p99_s:.0f} s",
        "GPU-hours by perfect": GPU_HOURS,
    }
    windows = (f"{row['refused_window_s']} s" if row["refused_window_s"] else "not at all" for row in rows)
    return format_table(columns, ({**row, "window": window} for row, window in zip(rows, windows, strict=True)))


def _drain(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = {
        "sent ahead, chunks": "{goodbye_chunks}",
        "grace period": "{grace_period_s} s",
        "sessions moved": "{moved}",
        "stalls": "{stalls}",
        "GPU-hours by perfect": GPU_HOURS,
    }
    return format_table(columns, rows)


def _max_attempts(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = {"{trace}, {capacity} on a GPU": f"{{refused_share:.2%}}; {WAITS}"}
    return _pivot(rows, {"max_attempts": "{max_attempts}"}, cells)


def _pivot(rows: Sequence[Mapping[str, Any]], keys: Mapping[str, str], cells: Mapping[str, str]) -> str:
    """One line per key: the cells of all its rows side by side, each under its own heading."""
    headings: dict[tuple[str, ...], list[str]] = {}
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = tuple(cell.format_map(row) for cell in keys.values())
        headings.setdefault(key, []).extend(title.format_map(row) for title in cells)
        lines.setdefault(key, []).extend(cell.format_map(row) for cell in cells.values())
    return markdown_table([*keys, *next(iter(headings.values()))], ((*key, *line) for key, line in lines.items()))
