# SPDX-License-Identifier: Apache-2.0
"""A record as the tables of docs/capacity.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import markdown_table
from deploy.autoscaling_simulator.arrivals import TRACES

SECTION = "deploy.autoscaling_simulator"


def trace_table(record: Mapping[str, Any]) -> str:
    """What viewers and the bill notice in every trace."""
    head = (
        "trace",
        "viewers",
        "a slot at once",
        "wait p50 / p95 / p99",
        "refused",
        "moved / stalls: pod failed",
        "moved / stalls: scaled down",
        "lost",
        "peak pods",
        "GPU-hours",
        "of a perfect fleet",
        "of a fixed fleet",
    )
    rows = []
    for name in TRACES:
        if name not in record:
            continue
        trace = record[name]
        waits = (f"{trace[f'wait_{part}_s']:.1f}" for part in ("p50", "p95", "p99"))
        moved, stalls = trace["moved_by_cause"], trace["stalls_by_cause"]
        causes = (f"{moved[cause]:,} / {stalls[cause]:,}" for cause in ("pod_failure", "scale_down"))
        hours = (f"{trace[key]:,.0f}" for key in ("gpu_hours", "perfect_gpu_hours", "fixed_gpu_hours"))
        refused = f"{trace['refused']:,} ({trace['refused_share']:.2%})"
        viewers = f"{trace['arrived'] + trace['live_at_the_beginning']:,}"
        counts = f"{trace['lost']:,}", f"{trace['peak_pods']:,}"
        at_once = f"{trace['at_once_share']:.2%}"
        rows.append((name, viewers, at_once, f"{' / '.join(waits)} s", refused, *causes, *counts, *hours))
    return markdown_table(head, rows)


def sweep_tables(record: Mapping[str, Any]) -> str:
    """What other thresholds would give."""
    shown = {"headroom": _headroom, "refused": _refused, "drain": _drain, "max_attempts": _attempts}
    return "\n\n".join(shown[table](rows) for table, rows in record[SECTION]["sweep"].items())


def _headroom(rows: Sequence[Mapping[str, Any]]) -> str:
    peaks = sorted({row["peak_sessions"] for row in rows})
    head = ["target busy share", "spare pods"]
    for peak in peaks:
        head += [f"{peak} sessions: refused", "wait p95 / p99", "GPU-hours by perfect"]
    lines: dict[tuple[float, int], list[str]] = {}
    for row in rows:
        key = row["target_busy_share"], row["spare_pods"]
        waits = f"{row['wait_p95_s']:.0f} / {row['wait_p99_s']:.0f} s"
        cells = f"{row['refused_share']:.2%}", waits, f"{row['gpu_hours_by_perfect']:.2f}"
        lines.setdefault(key, []).extend(cells)
    return markdown_table(head, ([f"{target:g}", f"{spare}", *cells] for (target, spare), cells in lines.items()))


def _refused(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("refused viewers count as demand for", "refused", "wait p99", "GPU-hours by perfect")
    return markdown_table(
        head,
        (
            (
                f"{row['refused_window_s']} s" if row["refused_window_s"] else "not at all",
                f"{row['refused_share']:.1%}",
                f"{row['wait_p99_s']:.0f} s",
                f"{row['gpu_hours_by_perfect']:.2f}",
            )
            for row in rows
        ),
    )


def _drain(rows: Sequence[Mapping[str, Any]]) -> str:
    head = ("sent ahead, chunks", "grace period", "sessions moved", "stalls", "GPU-hours by perfect")
    return markdown_table(
        head,
        (
            (
                str(row["goodbye_chunks"]),
                f"{row['grace_period_s']} s",
                str(row["moved"]),
                str(row["stalls"]),
                f"{row['gpu_hours_by_perfect']:.2f}",
            )
            for row in rows
        ),
    )


def _attempts(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for every number of tries, a column for every trace with a capacity: who is refused, and the waits."""
    columns = dict.fromkeys(f"{row['trace']}, {row['capacity']} on a GPU" for row in rows)
    lines: dict[int, list[str]] = {}
    for row in rows:
        cell = f"{row['refused_share']:.2%}; {row['wait_p95_s']:.0f} / {row['wait_p99_s']:.0f} s"
        lines.setdefault(row["max_attempts"], []).append(cell)
    return markdown_table(
        ["max_attempts", *columns], ([f"{max_attempts}", *cells] for max_attempts, cells in lines.items())
    )
