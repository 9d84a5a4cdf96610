# SPDX-License-Identifier: Apache-2.0
"""Kills servers, models, the proxy and clients at random while viewers watch: `python -m stress.chaos --kills 20`.

Servers behind HAProxy, sticky by session id. Every viewer that is not killed must get every frame once and in order;
the seams where its session went on elsewhere are measured against an uninterrupted run. Exit code 1 if one lost any.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import add_cluster_arguments, exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.__main__ import PROMPTS, server_metrics
from longlive_client.video_stream import AsyncVideoStream, StreamedChunk
from longlive_serve.protocol.session_options import ASAP
from stress.haproxy_cluster import Cluster

ROOT = Path(__file__).parents[1]
FAULTS = ("server", "model", "proxy", "client")
CHUNKS_AFTERWARDS = 3  # that every viewer still gets when the last kill is over
RESUME_FOR_S = 240.0
MUST_BE_ZERO = ("lost_frames", "repeated_frames", "sessions_left", "shared_memory_left", "processes_left")


@dataclasses.dataclass(kw_only=True)
class Seen:
    """What one viewer got."""

    number: int
    chunks: list[StreamedChunk] = dataclasses.field(default_factory=list)
    seams: list[int] = dataclasses.field(default_factory=list)
    """Places in `chunks` where the session went on elsewhere."""
    lost: int = 0
    """Frames that never came."""
    repeated: int = 0
    """Frames that came twice or out of order."""

    def take(self, chunk: StreamedChunk, resumed: int) -> None:
        last = self.chunks[-1] if self.chunks else None
        expected = last.first_frame + len(last.frames) if last else 0
        self.lost += max(0, chunk.first_frame - expected)
        self.repeated += max(0, expected - chunk.first_frame)
        if resumed > len(self.seams):
            self.seams.append(len(self.chunks))
        self.chunks.append(chunk)


def stream(url: str, number: int, **settings: Any) -> AsyncVideoStream:
    return AsyncVideoStream(PROMPTS[number % len(PROMPTS)], url=url, seed=number, **settings)


async def watch(url: str, seen: Seen, fps: int, over: asyncio.Event) -> None:
    remaining = CHUNKS_AFTERWARDS
    stall_s = 2 * 12 / fps + 2  # more than a chunk plays
    async with stream(url, seen.number, fps=fps, stall_timeout=stall_s, resume_for=RESUME_FOR_S) as video:
        async for chunk in video.chunks():
            if len(chunk.frames):
                seen.take(chunk, video.resumed)
                remaining -= over.is_set()
                if not remaining:
                    return


class Victims:
    """Viewers in processes of their own, to be killed."""

    def __init__(self, url: str, count: int, fps: int) -> None:
        self._command = [
            sys.executable,
            "-m",
            "benchmarks.serving",
            "--url",
            url,
            "--viewers",
            "1",
            "--seconds",
            "86400",
        ]
        self._command += ["--fps", str(fps), "--switch-every", "10"]
        self._processes = [self._start() for _ in range(count)]

    def kill(self, number: int) -> None:
        self._processes[number].kill()
        self._processes[number].wait()
        self._processes[number] = self._start()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


async def rage(cluster: Cluster, victims: Victims, args: argparse.Namespace) -> Counter[str]:
    """Kill something at random, again and again."""
    chance, kills = random.Random(args.seed), Counter[str]()
    with Progress() as progress:
        for _ in progress.track(range(args.kills), description="kills"):
            await asyncio.sleep(chance.uniform(*args.every))
            fault = chance.choice(FAULTS)
            if fault == "server":
                cluster.kill_server(chance.randrange(args.servers))
            elif fault == "model":
                cluster.kill_model(chance.randrange(args.servers))
            elif fault == "proxy":
                cluster.kill_proxy()
            else:
                await asyncio.to_thread(victims.kill, chance.randrange(args.victims))
            kills[fault] += 1
            progress.console.print(f"killed: {fault}")
    await asyncio.to_thread(cluster.wait_until_healthy)
    return kills


async def chaos(cluster: Cluster, args: argparse.Namespace) -> tuple[list[Seen], Counter[str]]:
    seen = [Seen(number=number) for number in range(args.viewers)]
    over = asyncio.Event()
    watching = [asyncio.create_task(watch(cluster.url, one, args.fps, over)) for one in seen]
    victims = Victims(cluster.url, args.victims, args.fps)
    try:
        while not all(one.chunks for one in seen):
            _raise_what_failed(watching)
            await asyncio.sleep(0.2)
        kills = await rage(cluster, victims, args)
        over.set()
        await asyncio.gather(*watching)
    finally:
        await asyncio.to_thread(victims.end)
    return seen, kills


def _raise_what_failed(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()


async def measure_seams(url: str, seen: Sequence[Seen], most: int) -> dict[str, float]:
    """First seams against the same videos without interruption; all seams against the usual change of frames."""
    differences, jumps = [], []
    interrupted = [one for one in seen if one.seams]
    with Progress() as progress:
        for one in progress.track(interrupted[:most], description="uninterrupted runs"):
            place = one.seams[0]
            async with stream(url, one.number, chunks=place + 1, pace=ASAP, resume_for=0) as video:
                alone = [chunk async for chunk in video.chunks() if len(chunk.frames)]
            differences.append(_difference(alone[place].frames, one.chunks[place].frames))
    for one in interrupted:
        frames = np.concatenate([chunk.frames for chunk in one.chunks])
        changes = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean((1, 2, 3))
        usual = float(np.median(changes))
        jumps += [float(changes[one.chunks[place].first_frame - 1]) / usual for place in one.seams if usual]
    return {
        "seam_difference_of_255": statistics.mean(differences) if differences else 0.0,
        "seam_difference_of_255_at_most": max(differences, default=0.0),
        "seam_jump_against_usual_change": statistics.mean(jumps) if jumps else 0.0,
    }


def _difference(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


def leaks(cluster: Cluster) -> dict[str, float]:
    """What the servers still hold when everybody has left."""
    end = time.monotonic() + 30
    while True:
        figures = [server_metrics(server.metrics_url) for server in cluster.servers]
        held = sum(one["live_sessions"] + one["waiting_sessions"] for one in figures)
        if not held or time.monotonic() > end:
            return {"sessions_left": held, "failed_sessions": sum(one["failed_sessions"] for one in figures)}
        time.sleep(0.5)


def left_behind() -> Counter[str]:
    """What there still is of this process's servers, once the killed have had time to go."""
    end = time.monotonic() + 60
    while (left := litter()) and time.monotonic() < end:
        time.sleep(0.2)
    return left


def litter() -> Counter[str]:
    """Shared memory and processes of servers that this process has started; others run theirs beside it."""
    own = f"longlive_{os.getpid()}_"  # Triton and its stub are told so what to call their shared memory
    found = Counter({"shared_memory": len(list(Path("/dev/shm").glob(f"{own}*")))})
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found["processes"] += own.encode() in command.read_bytes()
    return +found


def run(args: argparse.Namespace) -> dict[str, Any]:
    settings = f'preset = "{args.preset}"\nweights = "{args.weights}"\nslots = {2 * (args.viewers + args.victims)}\n'
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".toml") as config:
        print(settings, "max_utilization = 1.0\nmax_wait_s = 60", file=config, flush=True)
        print(f"starting {args.servers} servers ...", file=sys.stderr)
        with Cluster(args.servers, Path(config.name)) as cluster:
            seen, kills = asyncio.run(chaos(cluster, args))
            figures = leaks(cluster)
            figures |= asyncio.run(measure_seams(cluster.url, seen, args.compare))
            restarts = cluster.restarts
        left = left_behind()
    gaps = [b.arrived - a.arrived for one in seen for a, b in zip(one.chunks, one.chunks[1:], strict=False)]
    return {
        "servers": args.servers,
        "viewers": args.viewers,
        "fps": args.fps,
        "kills": dict(kills),
        "restarts": restarts,
        "resumed": sum(len(one.seams) for one in seen),
        "frames": sum(len(chunk.frames) for one in seen for chunk in one.chunks),
        "lost_frames": sum(one.lost for one in seen),
        "repeated_frames": sum(one.repeated for one in seen),
        "longest_gap_s": max(gaps),
        **figures,
        "shared_memory_left": left["shared_memory"],
        "processes_left": left["processes"],
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
        ("servers", 3, "behind the proxy"),
        ("viewers", 12, "that are not killed"),
        ("victims", 3, "viewers that are"),
        ("kills", 20, "of servers, models, the proxy and victims"),
        ("fps", 3, "at which all watch: slow, so that few cores are enough"),
        ("compare", 6, "first seams that are compared with an uninterrupted run"),
        ("seed", 0, "of what is killed when"),
    )
    add_cluster_arguments(parser, counts)
    parser.add_argument(
        "--every", type=float, nargs=2, default=(4.0, 12.0), metavar="S", help="seconds between kills (default: 4 12)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
