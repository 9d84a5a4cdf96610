# SPDX-License-Identifier: Apache-2.0
"""Runs a server at its announced capacity for a long time: `python -m stress.soak --minutes 30`.

Viewers switch prompts, leave and are replaced. Memory must not grow, no chunk may be late, and the server's metrics
must agree with the viewers' counts. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from benchmarks.command_line import exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.__main__ import PROMPTS, server_metrics, summarize
from benchmarks.serving.viewer import Viewer, ViewerConfig, ViewerStats
from longlive_serve.config.presets import FPS
from longlive_serve.triton_server.launcher import TritonServer

SAMPLE_S = 2.0
WARM_UP = 0.2  # share of the run before memory has settled
MAX_MB_PER_H = 40.0  # memory growth after that
MAX_UNSEEN = 4  # chunks per session generated after the viewer left


class Memory(threading.Thread):
    """Samples the resident memory of a server's processes, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="memory", daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            with contextlib.suppress(OSError):
                self.samples.append((time.monotonic(), self._resident_mb()))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def slope(self) -> float:
        """MB per hour: a linear fit to the samples after WARM_UP."""
        times, sizes = np.array(self.samples).T
        warm = times >= times[0] + WARM_UP * (times[-1] - times[0])
        return float(np.polyfit(times[warm], sizes[warm], 1)[0]) * 3600

    def _resident_mb(self) -> float:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text(encoding="utf-8").split()
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) for pid in (self._pid, *children)
        )
        return pages * 4096 / 1e6


async def watch_sessions(config: ViewerConfig, index: int, end: float, stats: list[ViewerStats]) -> None:
    """Run one viewer after another until `end`."""
    while time.monotonic() < end:
        stats.append(await Viewer(config, index + 100 * len(stats)).watch())


async def run_viewers(config: ViewerConfig, viewers: int, seconds: float) -> list[ViewerStats]:
    stats: list[ViewerStats] = []
    end = time.monotonic() + seconds
    with Progress() as progress:
        task = progress.add_task(f"{viewers} viewers", total=seconds)
        tasks = asyncio.gather(*(watch_sessions(config, index, end, stats) for index in range(viewers)))
        while not tasks.done():
            await asyncio.wait([tasks], timeout=1.0)
            progress.update(task, completed=seconds - max(0.0, end - time.monotonic()))
        await tasks
    return stats


def run(args: argparse.Namespace) -> dict[str, Any]:
    with TritonServer(config=args.config) as server:
        before = server_metrics(server.metrics_url)
        viewers = args.viewers or max(1, int(before["capacity_sessions"]))  # the first session is always admitted
        config = ViewerConfig(
            url=server.grpc_url,
            prompts=PROMPTS,
            seconds=args.session_seconds,
            switch_interval=args.switch_every,
            fps=args.fps,
        )
        memory = Memory(server.pid)
        memory.start()
        stats = asyncio.run(run_viewers(config, viewers, 60 * args.minutes))
        memory.stop()
        after = server_metrics(server.metrics_url)
    num_chunks = after["chunks"] - before["chunks"]
    return {
        "minutes": args.minutes,
        "viewers_at_once": viewers,
        "fps": args.fps,
        "sessions": len(stats),
        **{name: value for name, value in summarize(stats, args.fps).items() if name not in ("viewers", "watched")},
        "prompt_switches": sum(len(one.switch_latencies) for one in stats),
        "server_chunks": num_chunks,
        "deadline_misses": after["deadline_misses"] - before["deadline_misses"],
        "live_sessions_left": after["live_sessions"] + after["waiting_sessions"],
        "memory_mb": memory.samples[-1][1],
        "memory_slope_mb_per_h": memory.slope(),
    }


def failures(results: dict[str, Any]) -> list[str]:
    num_unseen = results["server_chunks"] - results["chunks"]
    errors = {name: results[name] for name in ("failed", "disordered_chunks", "deadline_misses", "stalls")}
    messages = [f"{name}: got {value}, expected none" for name, value in errors.items() if value]
    if not 0 <= num_unseen <= MAX_UNSEEN * results["sessions"]:
        messages.append(f"chunks: the server made {results['server_chunks']}, the viewers saw {results['chunks']}")
    if results["memory_slope_mb_per_h"] > MAX_MB_PER_H:
        messages.append(
            f"memory: grew by {results['memory_slope_mb_per_h']:.0f} MB/h, expected at most {MAX_MB_PER_H:g}"
        )
    return messages


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stress.soak", description=__doc__)
    for name, kind, default, text in (
        ("minutes", float, 30.0, "duration"),
        ("viewers", int, 0, "concurrent viewers; 0: the server's announced capacity"),
        ("session-seconds", float, 120.0, "watch time of each viewer"),
        ("switch-every", float, 5.0, "seconds between prompt switches"),
        ("fps", int, FPS, "playback rate"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings of the server (default: the demo model)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    measurement = Measurement.begin("stress.soak", argv)
    results = run(args)
    print(json.dumps(results, indent=2))
    top_level = {"soak_minutes": args.minutes, "soak_rss_slope_mb_per_h": results["memory_slope_mb_per_h"]}
    write_serving_results(
        measurement, args.json, results, section="trials.soak", code="stress/soak.py", top_level=top_level
    )
    counts = failures(results)
    for text in counts:
        print(text, file=sys.stderr)
    return 1 if counts else 0


if __name__ == "__main__":
    sys.exit(main())
