# SPDX-License-Identifier: Apache-2.0
"""Kills servers, models, the proxy and clients at random while viewers watch: `python -m stress.chaos --kills 20`.

The servers are behind HAProxy, sticky by session id. Every viewer that is not killed must get every frame once and in
order. Sessions resumed on another server are compared with uninterrupted runs. Exit code 1 if frames were lost.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import add_cluster_arguments, exit_code, write_serving_results
from benchmarks.results import ROOT, Measurement
from longlive_serve.protocol.session_options import ASAP
from stress.haproxy_cluster import Cluster
from stress.viewers import MUST_BE_ZERO, ViewerLog, Viewers, open_stream, remaining_resources, remaining_sessions

FAULTS = ("server", "model", "proxy", "client")
CHUNKS_AFTERWARDS = 3  # that every viewer must receive after the last kill


class VictimProcesses:
    """Viewers to kill, each in its own process."""

    def __init__(self, url: str, count: int, fps: int) -> None:
        options = f"--viewers 1 --seconds 86400 --switch-every 10 --fps {fps}".split()
        self._command = [sys.executable, "-m", "benchmarks.serving", "--url", url, *options]
        self._processes = [self._start() for _ in range(count)]

    def kill(self, index: int) -> None:
        self._processes[index].kill()
        self._processes[index].wait()
        self._processes[index] = self._start()

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def inject_faults(cluster: Cluster, victims: VictimProcesses, args: argparse.Namespace) -> Counter[str]:
    """Kill something at random, again and again."""
    rng, kills = random.Random(args.seed), Counter[str]()
    with Progress() as progress:
        for _ in progress.track(range(args.kills), description="kills"):
            await asyncio.sleep(rng.uniform(*args.every))
            fault = rng.choice(FAULTS)
            if fault == "server":
                cluster.kill_server(rng.randrange(args.servers))
            elif fault == "model":
                cluster.kill_model(rng.randrange(args.servers))
            elif fault == "proxy":
                cluster.kill_proxy()
            else:
                await asyncio.to_thread(victims.kill, rng.randrange(args.victims))
            kills[fault] += 1
            progress.console.print(f"killed: {fault}")
    await asyncio.to_thread(cluster.wait_until_healthy)
    return kills


async def watch_under_faults(cluster: Cluster, args: argparse.Namespace) -> tuple[Viewers, Counter[str]]:
    stall_s = 2 * 12 / args.fps + 2  # longer than a chunk's playback time
    viewers = Viewers(cluster.url, fps=args.fps, stall_timeout=stall_s)
    viewers.start(args.viewers)
    victims = VictimProcesses(cluster.url, args.victims, args.fps)
    try:
        await viewers.wait_for_chunks(1)
        kills = await inject_faults(cluster, victims, args)
        await viewers.wait_for_chunks(CHUNKS_AFTERWARDS)
        await viewers.stop()
    finally:
        await asyncio.to_thread(victims.stop)
    return viewers, kills


async def compare_with_uninterrupted(url: str, logs: Sequence[ViewerLog], max_videos: int) -> dict[str, float]:
    """Compare the first resumed chunk of each video with an uninterrupted run, and the change of the picture at the
    resume with the video's median change between frames."""
    differences, jumps = [], []
    logs = [log for log in logs if log.resumed_at]
    with Progress() as progress:
        for log in progress.track(logs[:max_videos], description="uninterrupted runs"):
            first = log.resumed_at[0]
            async with open_stream(url, log.index, chunks=first + 1, pace=ASAP, resume_for=0) as video:
                expected = [chunk async for chunk in video.chunks() if len(chunk.frames)]
            differences.append(_mean_difference(expected[first].frames, log.chunks[first].frames))
    for log in logs:
        frames = np.concatenate([chunk.frames for chunk in log.chunks])
        changes = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
        median = float(np.median(changes))
        jumps += [float(changes[log.chunks[i].first_frame - 1]) / median for i in log.resumed_at if median]
    return {
        "seam_difference_of_255": statistics.mean(differences) if differences else 0.0,
        "seam_difference_of_255_at_most": max(differences, default=0.0),
        "seam_jump_against_usual_change": statistics.mean(jumps) if jumps else 0.0,
    }


def _mean_difference(frames: np.ndarray[Any, Any], others: np.ndarray[Any, Any]) -> float:
    return float(np.abs(frames.astype(np.int16) - others.astype(np.int16)).mean())


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = f'preset = "{args.preset}"\nweights = "{args.weights}"\nslots = {2 * (args.viewers + args.victims)}\n'
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".toml") as config:
        print(settings, "max_utilization = 1.0\nmax_wait_s = 60", file=config, flush=True)
        print(f"starting {args.servers} servers ...", file=sys.stderr)
        with Cluster(args.servers, Path(config.name)) as cluster:
            viewers, kills = asyncio.run(watch_under_faults(cluster, args))
            results: dict[str, Any] = remaining_sessions(cluster)
            results |= asyncio.run(compare_with_uninterrupted(cluster.url, viewers.logs, args.compare))
            restarts = cluster.restarts
    pairs = [pair for log in viewers.logs for pair in zip(log.chunks, log.chunks[1:], strict=False)]
    return {
        "servers": args.servers,
        "viewers": args.viewers,
        "fps": args.fps,
        "kills": dict(kills),
        "restarts": restarts,
        "resumed": viewers.resumed,
        **viewers.results(),
        "longest_gap_s": max(after.arrived - before.arrived for before, after in pairs),
        **results,
        **remaining_resources(),
    }


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    measurement = Measurement.begin("stress.chaos", argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several servers share the cores
    results = run(args)
    Console().print_json(data=results)
    top_level = {"chaos_kills": args.kills, "chaos_lost_frames": results["lost_frames"]}
    write_serving_results(
        measurement, args.json, results, section="trials.chaos", code="stress/chaos.py", top_level=top_level
    )
    return 1 if any(results[name] for name in MUST_BE_ZERO) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stress.chaos", description=__doc__)
    counts = (
        ("servers", 3, "number behind the proxy"),
        ("viewers", 12, "viewers that are not killed"),
        ("victims", 3, "viewers that are killed"),
        ("kills", 20, "kills of servers, models, the proxy and victims"),
        ("fps", 3, "playback rate, low to need few cores"),
        ("compare", 6, "resumed videos to compare with an uninterrupted run"),
        ("seed", 0, "random seed of the kills"),
    )
    add_cluster_arguments(parser, counts)
    parser.add_argument(
        "--every", type=float, nargs=2, default=(4.0, 12.0), metavar="S", help="seconds between kills (default: 4 12)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
