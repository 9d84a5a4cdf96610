# SPDX-License-Identifier: Apache-2.0
"""A run's record as tables for a terminal and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.engines.live import CHUNK_PLAYS_S
from benchmarks.engines.measure import PHASES
from benchmarks.engines.record import top_figures

TERA, MIB = 1e12, 2**20


def tables(record: dict[str, Any]) -> Iterator[Table | str]:
    """What there is to show of a record, finished or not. Fits a terminal of 100 columns."""
    if record["rows"]:
        yield chunk_table(record["rows"])
        yield session_table(record["rows"])
        yield from (check_line(row) for row in record["rows"] if "check" in row)
    if record["attention"]:
        yield attention_table(record["attention"])
    if record["roofline"]:
        yield roofline_line(record["roofline"])
    for what in ("skipped", "failed"):
        yield from (f"{what}: {name}: {reason}" for name, reason in record[what].items())
    if record["rows"]:
        figures = top_figures(record["rows"])
        yield ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)


def _grid(title: str, columns: Sequence[str]) -> Table:
    grid = Table(box=SIMPLE, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for number, column in enumerate(columns):
        grid.add_column(column, justify="right" if number else "left", no_wrap=True)
    return grid


def check_line(row: dict[str, Any]) -> str:
    found = row["check"]
    first, last = (f"{100 * found['latents_off'][chunk]:.2g} %" for chunk in (0, -1))
    twice = "the same bits twice" if found["same_twice"] else "other bits the second time"
    frames = f"frames {found['frames_off']:.2g}"
    return f"{row['name']}: latents {first} off torch's ({last} in the last chunk), {frames}; {twice}"


def chunk_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = ("row", *PHASES, "chunk", "p10 - p90", "fps\nDiT", "fps\nall", "DiT of\nroofline", "VAE of\nroofline")
    grid = _grid("ms per chunk of 12 frames, medians", columns)
    for row in rows:
        chunk = row["chunk_s"]
        phases = (f"{1e3 * row['phases_s'][phase]['median']:.1f}" for phase in PHASES)
        whole = f"{1e3 * chunk['median']:.1f}", f"{1e3 * chunk['p10']:.1f} - {1e3 * chunk['p90']:.1f}"
        shares = (f"{share:.1%}" if (share := row["of_roofline"].get(part)) else "-" for part in ("dit", "decode"))
        grid.add_row(row["name"], *phases, *whole, f"{row['dit_fps']:.1f}", f"{row['fps']:.1f}", *shares)
    return grid


def session_table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = (
        "row",
        "first frame\ns",
        "new prompt\np50 / p95 s",
        "encode\nms",
        "recache\nms",
        "MiB per\nsession",
        "live at\n16 fps",
        "lateness\np95 s",
    )
    grid = _grid("sessions, the VAE in every figure", columns)
    for row in rows:
        switch, live = row["switch_s"], row["live"]
        kept = [run for run in live["runs"] if run["sessions"] == live["sessions"]] or live["runs"]
        late = kept[-1]["lateness_s"]
        grid.add_row(
            row["name"],
            f"{row['first_frame_s']['median']:.3f}",
            f"{switch['median']:.3f} / {switch['p95']:.3f}",
            f"{1e3 * row['encode_s']['median']:.1f}",
            f"{1e3 * row['recache_s']['median']:.1f}",
            f"{row['session_bytes']['total'] / MIB:.1f}",
            f"{live['sessions']}{' or more' if live['sessions'] == live['most_tried'] else ''}",
            f"{late['p95']:+.3f}" if late else "-",
        )
    return grid


def attention_table(attention: dict[str, Any]) -> Table:
    size = f"{attention['queries']} queries, {attention['keys']} keys"
    title = f"attention, {size}, {attention['heads']} heads of {attention['head_dim']}, {attention['dtype']}"
    grid = _grid(title, ("kernel", "ms", "TFLOP/s", "error"))
    for kernel in attention["kernels"]:
        if "reason" in kernel:
            grid.add_row(kernel["name"], "-", "-", kernel["reason"][:60])
            continue
        times = f"{1e3 * kernel['seconds']['median']:.3f}", f"{kernel['flops'] / TERA:.3g}"
        grid.add_row(kernel["name"], *times, f"{kernel['relative_error']:.1e}")
    return grid


def roofline_line(roofline: dict[str, Any]) -> str:
    """What the device does with nothing in its way."""
    speeds = [
        f"{dtype} {speed / TERA:.3g} TFLOP/s" if speed else f"{dtype} none ({roofline['reasons'][dtype]})"
        for dtype, speed in roofline["flops"].items()
    ]
    copy = f"copy {roofline['copy_bytes_per_s'] / TERA:.3g} TB/s"
    return f"roofline, {roofline['size']}^3: " + ", ".join([*speeds, copy])


def plot(record: dict[str, Any], path: Path) -> None:
    """Milliseconds of a chunk by phase, and the time that it plays, as PNG."""
    from matplotlib.figure import Figure  # of the extra `bench`

    rows = record["rows"][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.5 * len(rows)), layout="constrained")
    axes, names, lefts = figure.subplots(), [row["name"] for row in rows], [0.0] * len(rows)
    for phase in PHASES:
        widths = [1e3 * row["phases_s"][phase]["median"] for row in rows]
        axes.barh(names, widths, left=lefts, label=phase)
        lefts = [left + width for left, width in zip(lefts, widths, strict=True)]
    plays = 1e3 * CHUNK_PLAYS_S
    axes.axvline(plays, color="black", linestyle="--", label=f"a chunk plays {plays:.0f} ms")
    axes.set_xlabel(f"ms per chunk, preset {record['preset']} on {record['device']}")
    axes.legend(fontsize="small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
