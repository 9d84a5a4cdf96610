# SPDX-License-Identifier: Apache-2.0
"""Formats a run's record as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.live import CHUNK_PLAYS_S
from benchmarks.engines.measure import PHASES
from benchmarks.engines.record import top_level_results
from benchmarks.results import format_table, markdown_table

TERA, MIB = 1e12, 2**20
SESSION_COLUMNS = {
    "sessions, VAE included": "{name}",
    "first frame, s": "{first_frame_s[median]:.3f}",
    "new prompt p50 / p95, s": "{switch_s[median]:.3f} / {switch_s[p95]:.3f}",
    "encode, s": "{encode_s[median]:.4f}",
    "recache, s": "{recache_s[median]:.4f}",
    "MiB per session": "{session_mib:.1f}",
    "live at 16 fps": "{sessions}",
    "lateness p95, s": "{lateness}",
}


def tables(record: dict[str, Any]) -> Iterator[str]:
    """The tables of a record, complete or not."""
    if record["rows"]:
        yield chunk_table(record["rows"])
        yield format_table(SESSION_COLUMNS, (row | _session_cells(row) for row in record["rows"]))
        yield from (check_line(row) for row in record["rows"] if "check" in row)
    if record["attention"]:
        yield attention_table(record["attention"])
    if record["roofline"]:
        yield roofline_line(record["roofline"])
    for key in ("skipped", "failed"):
        yield from (f"{key}: {name}: {reason}" for name, reason in record[key].items())
    if record["rows"]:
        top = top_level_results(record["rows"])
        yield ", ".join(f"{name} {value:.4g}" for name, value in top.items() if value is not None)


def check_line(row: dict[str, Any]) -> str:
    check = row["check"]
    first, last = (f"{100 * check['latents_off'][chunk]:.2g} %" for chunk in (0, -1))
    repeated = "bitwise reproducible" if check["same_twice"] else "not bitwise reproducible"
    frames = f"frames {check['frames_off']:.2g} of 255"
    return f"{row['name']}: latents {first} off torch's ({last} in the last chunk), {frames}; {repeated}"


def chunk_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("ms per chunk of 12 frames, medians", *PHASES, "chunk", "p10 - p90", "fps DiT", "fps all")
    lines = []
    for row in rows:
        chunk = {name: 1e3 * seconds for name, seconds in row["chunk_s"].items()}
        phases = (f"{1e3 * row['phases_s'][phase]['median']:.1f}" for phase in PHASES)
        total = f"{chunk['median']:.1f}", f"{chunk['p10']:.1f} - {chunk['p90']:.1f}"
        roofline = (f"{share:.1%}" if (share := row["of_roofline"].get(part)) else "-" for part in ("dit", "decode"))
        lines.append((row["name"], *phases, *total, f"{row['dit_fps']:.1f}", f"{row['fps']:.1f}", *roofline))
    return markdown_table((*header, "DiT of roofline", "VAE of roofline"), lines)


def _session_cells(row: dict[str, Any]) -> dict[str, Any]:
    live = row["live"]
    runs = [run for run in live["runs"] if run["sessions"] == live["sessions"]] or live["runs"]
    lateness = runs[-1]["lateness_s"]
    return {
        "session_mib": row["session_bytes"]["total"] / MIB,
        "sessions": f"{live['sessions']}{' or more' if live['sessions'] == live['most_tried'] else ''}",
        "lateness": f"{lateness['p95']:+.3f}" if lateness else "-",
    }


def attention_table(attention: dict[str, Any]) -> str:
    size = f"{attention['queries']} queries, {attention['keys']} keys"
    title = f"attention, {size}, {attention['heads']} heads of {attention['head_dim']}, {attention['dtype']}"
    lines = []
    for kernel in attention["kernels"]:
        if "reason" in kernel:
            lines.append((kernel["name"], "-", "-", kernel["reason"][:60]))
            continue
        times = f"{1e3 * kernel['seconds']['median']:.3f}", f"{kernel['flops'] / TERA:.3g}"
        lines.append((kernel["name"], *times, f"{kernel['relative_error']:.1e}"))
    return markdown_table((title, "ms", "TFLOP/s", "error"), lines)


def roofline_line(roofline: dict[str, Any]) -> str:
    speeds = [
        f"{dtype} {speed / TERA:.3g} TFLOP/s" if speed else f"{dtype} none ({roofline['reasons'][dtype]})"
        for dtype, speed in roofline["flops"].items()
    ]
    copy = f"copy {roofline['copy_bytes_per_s'] / TERA:.3g} TB/s"
    return f"roofline, {roofline['size']}^3: " + ", ".join([*speeds, copy])


def plot(record: dict[str, Any], path: Path) -> None:
    """Plot the milliseconds per chunk by phase, and a chunk's playback time, as PNG."""
    from matplotlib.figure import Figure  # of the extra `bench`

    rows = record["rows"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes, names, offsets = figure.subplots(), [row["name"] for row in rows], [0.0] * len(rows)
    for phase in PHASES:
        widths = [1e3 * row["phases_s"][phase]["median"] for row in rows]
        axes.barh(names, widths, left=offsets, label=phase)
        offsets = [left + width for left, width in zip(offsets, widths, strict=True)]
    plays = 1e3 * CHUNK_PLAYS_S
    axes.axvline(plays, color="black", linestyle="--", label=f"a chunk plays {plays:.0f} ms")
    axes.set_xlabel(f"ms per chunk, preset {record['preset']} on {record['device']}")
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
