# SPDX-License-Identifier: Apache-2.0
"""Prints results/serving.json as the tables of docs/performance.md: `python -m benchmarks.tables`."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.results import ROOT, markdown_table, read_results

RESULTS = ROOT / "results/serving.json"


def viewers_table(runs: Sequence[Mapping[str, Any]]) -> str:
    """One row per run of `benchmarks.serving`."""
    header = ("viewers", "watch at once", "frames/s", "stalls", "late chunks")
    latencies = {"first frame": "first_frame_s", "new prompt": "switch_s"}
    rows = []
    for run in runs:
        watching = run["viewers"] - run["queued"] - run["refused"]
        late = f"{run['deadline_misses']:.0f}" if "deadline_misses" in run else "-"
        seconds = (run[key] for key in latencies.values())
        cells = (f"{value['p50']:.2f} / {value['p95']:.2f} s" if value else "-" for value in seconds)
        rows.append((run["viewers"], watching, f"{run['frames_per_s']:.0f}", run["stalls"], late, *cells))
    return markdown_table([*header, *(f"{name} p50 / p95" for name in latencies)], rows)


def stress_table(record: dict[str, Any]) -> str:
    """One row per stress test."""
    chaos, soak, fuzz, fleet = (record[f"trials.{name}"] for name in ("chaos", "soak", "fuzz", "fleet"))
    kills = ", ".join(f"{count} x {name}" for name, count in sorted(chaos["kills"].items()))
    seam = f"{chaos['seam_difference_of_255']:.2f} of 255 from the uninterrupted video"
    viewers = (
        f"{chaos['viewers']} viewers at {chaos['fps']} fps, {chaos['frames']} frames, {chaos['resumed']} times resumed"
    )
    memory = f"memory {soak['memory_slope_mb_per_h']:+.1f} MB/h at {soak['memory_mb']:.0f} MB"
    late = f"{soak['deadline_misses']:.0f} late chunks of {soak['server_chunks']:.0f}, {soak['stalls']} stalls"
    perf = [
        f"{run['perf_analyzer']['chunks_per_s']:.2f} and {run['benchmark']['chunks_per_s']:.2f} ({run['ratio']:.2f})"
        for run in record["trials.perf"]["runs"]
    ]
    rows = {
        f"kills: {kills}": f"{viewers}: **{chaos['lost_frames']} lost, {chaos['repeated_frames']} repeated**; {seam}",
        f"{fleet['servers']} servers with mutual TLS and tokens; one killed, one drained": _fleet(fleet),
        f"{soak['minutes']:g} minutes, {soak['viewers_at_once']} viewers at once": f"{soak['sessions']} sessions, "
        f"{soak['prompt_switches']} prompt switches, {late}; {memory}",
        f"{fuzz['requests']} wrong requests": f"{fuzz['crashes']} crashes, {fuzz['disturbed_videos']} disturbed videos",
        "perf_analyzer and benchmark, chunks per s": f"1 to {len(perf)} sessions: " + ", ".join(perf),
    }
    return markdown_table(("stress test", "result"), rows.items())


def _fleet(results: dict[str, Any]) -> str:
    rejected, lost = (
        results["turned_away"].values(),
        f"{results['lost_frames']} lost, {results['repeated_frames']} repeated",
    )
    return (
        f"{results['viewers']} viewers at {results['fps']} fps and {results['late_viewers']} who joined later, "
        f"{results['resumed_after_kill']} and {results['resumed_after_drain']} resumed: **{lost}**, "
        f"{results['viewers_who_saw_a_stall']} saw a stall; {results['found_over_another_connection']} of "
        f"{results['viewers']} found over another connection; {sum(rejected)} of {len(rejected)} intruders refused"
    )


def main() -> int:
    record = read_results(RESULTS)
    print(viewers_table(record["client.benchmark"]["runs"]), stress_table(record), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
