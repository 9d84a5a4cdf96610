# SPDX-License-Identifier: Apache-2.0
"""As many viewers as the server announces room for, for a long time: `python -m stress.soak --minutes 30`.

They switch prompts and come and go. Memory must stay flat, no chunk may be late, and the server's figures must agree
with what the viewers counted. Exit code 1 otherwise.
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
from benchmarks.serving.__main__ import PROMPTS, server_metrics, summary
from benchmarks.serving.viewer import Seen, Viewer, Watching
from longlive_serve.config.presets import FPS
from longlive_serve.triton_server.launcher import TritonServer

SAMPLE_S = 2.0
SETTLING = 0.2  # share of the time that memory may take to settle
MOST_MB_PER_H = 40.0  # slope of the memory from then on
UNSEEN = 4  # chunks per session that the server may have made and the viewer, who had left, not counted


class Memory(threading.Thread):
    """Samples what the processes of a server hold, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(name="memory", daemon=True)
        self._pid = pid
        self._over = threading.Event()
        self.samples: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._over.wait(SAMPLE_S):
            with contextlib.suppress(OSError):
                self.samples.append((time.monotonic(), self._resident()))

    def stop(self) -> None:
        self._over.set()
        self.join()

    def slope(self) -> float:
        """MB per hour, of a straight line through the samples after the first SETTLING of the time."""
        times, sizes = np.array(self.samples).T
        settled = times >= times[0] + SETTLING * (times[-1] - times[0])
        return float(np.polyfit(times[settled], sizes[settled], 1)[0]) * 3600

    def _resident(self) -> float:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text(encoding="utf-8").split()
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1]) for pid in (self._pid, *children)
        )
        return pages * 4096 / 1e6


async def visit(watching: Watching, number: int, end: float, seen: list[Seen]) -> None:
    """One seat: a viewer after another, until `end`."""
    while time.monotonic() < end:
        seen.append(await Viewer(watching, number + 100 * len(seen)).watch())


async def crowd(watching: Watching, viewers: int, seconds: float) -> list[Seen]:
    seen: list[Seen] = []
    end = time.monotonic() + seconds
    with Progress() as progress:
        task = progress.add_task(f"{viewers} viewers", total=seconds)
        seats = asyncio.gather(*(visit(watching, number, end, seen) for number in range(viewers)))
        while not seats.done():
            await asyncio.wait([seats], timeout=1.0)
            progress.update(task, completed=seconds - max(0.0, end - time.monotonic()))
        await seats
    return seen


def run(args: argparse.Namespace) -> dict[str, Any]:
    with TritonServer(config=args.config) as server:
        before = server_metrics(server.metrics_url)
        viewers = args.viewers or max(1, int(before["capacity_sessions"]))  # one is always let in
        watching = Watching(
            url=server.grpc_url,
            prompts=PROMPTS,
            seconds=args.session_seconds,
            switch_every=args.switch_every,
            fps=args.fps,
        )
        memory = Memory(server.pid)
        memory.start()
        seen = asyncio.run(crowd(watching, viewers, 60 * args.minutes))
        memory.stop()
        after = server_metrics(server.metrics_url)
    made = after["chunks"] - before["chunks"]
    return {
        "minutes": args.minutes,
        "viewers_at_once": viewers,
        "fps": args.fps,
        "sessions": len(seen),
        **{name: value for name, value in summary(seen, args.fps).items() if name not in ("viewers", "watched")},
        "prompt_switches": sum(len(one.switches) for one in seen),
        "server_chunks": made,
        "deadline_misses": after["deadline_misses"] - before["deadline_misses"],
        "live_sessions_left": after["live_sessions"] + after["waiting_sessions"],
        "memory_mb": memory.samples[-1][1],
        "memory_slope_mb_per_h": memory.slope(),
    }


def complaints(figures: dict[str, Any]) -> list[str]:
    unseen = figures["server_chunks"] - figures["chunks"]
    wrong = {name: figures[name] for name in ("failed", "disordered_chunks", "deadline_misses", "stalls")}
    texts = [f"{name}: got {value}, expected none" for name, value in wrong.items() if value]
    if not 0 <= unseen <= UNSEEN * figures["sessions"]:
        texts.append(f"chunks: the server made {figures['server_chunks']}, the viewers saw {figures['chunks']}")
    if figures["memory_slope_mb_per_h"] > MOST_MB_PER_H:
        texts.append(f"memory: grew by {figures['memory_slope_mb_per_h']:.0f} MB/h, expected at most {MOST_MB_PER_H:g}")
    return texts


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stress.soak", description=__doc__)
    for name, kind, default, what in (
        ("minutes", float, 30.0, "how long"),
        ("viewers", int, 0, "at once; 0: as many as the server announces room for"),
        ("session-seconds", float, 120.0, "how long each stays"),
        ("switch-every", float, 5.0, "seconds between prompts"),
        ("fps", int, FPS, "at which they watch"),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings of the server (default: the demo model)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    measurement = Measurement.begin("stress.soak", argv)
    figures = run(args)
    print(json.dumps(figures, indent=2))
    top_level = {"soak_minutes": args.minutes, "soak_rss_slope_mb_per_h": figures["memory_slope_mb_per_h"]}
    write_serving_results(
        measurement, args.json, figures, section="trials.soak", code="stress/soak.py", top_level=top_level
    )
    found = complaints(figures)
    for text in found:
        print(text, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
