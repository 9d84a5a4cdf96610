# SPDX-License-Identifier: Apache-2.0
"""Benchmarks a server with simulated viewers: `python -m benchmarks.serving --serve --viewers 1,2,4`.

Prints a table; `--json` and `--plot` write files. All results include the VAE, the server, gRPC and the client.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.command_line import exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.viewer import ViewerConfig, ViewerStats, run_viewers
from benchmarks.tables import viewers_table
from longlive_client.grpc_transport import DEFAULT_URL, add_access_arguments, get_tls
from longlive_client.proxies import open_http
from longlive_serve.config.presets import FPS
from longlive_serve.protocol.session_options import PACES, REALTIME

PROMPTS = (
    "A red circle drifts right over a plain black background.",
    "There is one blue square here. It moves up across a plain white background.",
    "A single green triangle slowly glides left across an empty gray scene.",
    "In this scene a yellow cross stays still on a plain black background.",
)
PERCENTILES = (50, 95, 99)


def summarize(stats: Sequence[ViewerStats], fps: int) -> dict[str, Any]:
    """The results of one run. Times in seconds; percentiles over all viewers that received frames."""
    active = [one for one in stats if one.chunks]
    frames = sum(one.frames for one in active)
    ended = max((one.start + one.duration for one in active), default=0.0)
    duration = ended - min((one.start for one in active), default=0.0)  # queued viewers start later
    playing = sum(one.duration for one in active) * fps
    return {
        "viewers": len(stats),
        "watched": len(active),
        "queued": sum(one.queued for one in stats),
        "refused": sum(bool(one.refused) for one in stats),
        "failed": sum(bool(one.failed) for one in stats),
        "disordered_chunks": sum(one.out_of_order for one in stats),
        "chunks": sum(one.chunks for one in stats),
        "frames": frames,
        "frames_per_s": frames / duration if duration else 0.0,
        "chunks_per_s": sum(one.chunks for one in active) / duration if duration else 0.0,
        "real_time_factor": frames / playing if playing else 0.0,
        "stalls": sum(len(one.stalls) for one in stats),
        "stalled_s": sum(sum(one.stalls) for one in stats),
        "first_frame_s": _percentiles(
            [one.first_frame_latency for one in active if one.first_frame_latency is not None]
        ),
        "chunk_gap_s": _percentiles([gap for one in active for gap in one.gaps]),
        "switch_s": _percentiles([latency for one in active for latency in one.switch_latencies]),
    }


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def server_metrics(url: str) -> dict[str, float]:
    """The server's `longlive_*` metrics by name, without the prefix. Empty if `url` is empty."""
    if not url:
        return {}
    with open_http(f"http://{url}/metrics", timeout_s=10) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^longlive_(\w+)(?:{[^}]*})? (\S+)$", text, re.MULTILINE)}


def run(args: argparse.Namespace, url: str, metrics_url: str) -> list[dict[str, Any]]:
    rows = []
    for viewers in args.viewers:
        config = ViewerConfig(
            url=url,
            prompts=args.prompt or PROMPTS,
            seconds=args.seconds,
            switch_interval=args.switch_every,
            fps=args.fps,
            pace=args.pace,
            tls=args.tls,
            access_token=args.access_token,
        )
        before = server_metrics(metrics_url)
        print(f"{viewers} viewers for {args.seconds:g} s ...", file=sys.stderr)
        stats = asyncio.run(run_viewers(config, viewers, args.apart))
        after = server_metrics(metrics_url)
        row = summarize(stats, args.fps)
        if after:
            row["deadline_misses"] = after["deadline_misses"] - before["deadline_misses"]
            row["announced_capacity"] = after["capacity_sessions"]
        for reason in sorted({one.failed for one in stats if one.failed}):
            print(f"failed: {reason}", file=sys.stderr)
        rows.append(row)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Latencies and stalls against viewers, as PNG."""
    from matplotlib.figure import Figure  # of the extra `bench`

    viewers = [row["viewers"] for row in rows]
    figure = Figure(figsize=(8, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for name, label in (("first_frame_s", "first frame"), ("switch_s", "prompt switch"), ("chunk_gap_s", "chunk gap")):
        known = [(row["viewers"], row[name]) for row in rows if row[name] is not None]
        (line,) = above.plot([n for n, _ in known], [v["p50"] for _, v in known], "o-", label=f"{label}, median")
        above.plot([n for n, _ in known], [v["p95"] for _, v in known], ":", color=line.get_color(), label="95 %")
    above.set_ylabel("seconds")
    above.set_ylim(bottom=0)
    above.legend(fontsize="small", ncols=3)
    below.bar(viewers, [row["stalls"] for row in rows], color="tab:red", label="stalls")
    below.plot(viewers, [row["watched"] for row in rows], "ko-", label="received frames")
    below.set_xlabel("viewers")
    below.set_xticks(viewers)
    below.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def _server(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if not args.serve:
        yield args.url or DEFAULT_URL, args.metrics_url or ""
        return
    from longlive_serve.triton_server.launcher import TritonServer  # needed only with --serve

    print("starting a server ...", file=sys.stderr)
    with TritonServer(config=args.config) as server:
        yield server.grpc_url, server.metrics_url


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    measurement = Measurement.begin("benchmarks.serving", argv)
    with _server(args) as (url, metrics_url):
        rows = run(args, url, metrics_url)
    print(viewers_table(rows))
    top_level = {
        "sessions_admitted": max(row.get("announced_capacity", row["watched"]) for row in rows),
        "deadline_misses": sum(row.get("deadline_misses", 0) for row in rows),
    }
    code = "benchmarks/serving/__main__.py"
    write_serving_results(
        measurement, args.json, {"runs": rows}, section="client.benchmark", code=code, top_level=top_level
    )
    if args.plot is not None:
        plot(rows, args.plot)
    return 1 if any(row["failed"] or row["disordered_chunks"] for row in rows) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--viewers", type=_counts, default=[1, 2, 4], metavar="N,N", help="a run each (default: 1,2,4)")
    parser.add_argument("--seconds", type=float, default=20.0, help="watch time of each viewer (default: %(default)g)")
    parser.add_argument(
        "--switch-every", type=float, default=5.0, metavar="S", help="seconds between switches; 0: none (default: 5)"
    )
    parser.add_argument("--apart", type=float, default=0.0, metavar="S", help="seconds between arrivals (default: 0)")
    parser.add_argument("--fps", type=int, default=FPS, help="playback rate (default: %(default)s)")
    text = "realtime: paced for playback; asap: as fast as the server can (default: %(default)s)"
    parser.add_argument("--pace", choices=PACES, default=REALTIME, help=text)
    parser.add_argument("--prompt", action="append", help="may be repeated (default: captions of the demo world)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--url", help=f"the server's gRPC address (default: {DEFAULT_URL})")
    where.add_argument("--serve", action="store_true", help="start a server for this run")
    parser.add_argument("--metrics-url", metavar="HOST:PORT", help="the server's metrics (not needed with --serve)")
    parser.add_argument("--config", type=Path, metavar="TOML", help="the server's settings (with --serve)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the results (extra `bench`)")
    add_access_arguments(parser)
    args = parser.parse_args(argv)
    args.tls = get_tls(parser, args)
    if args.config is not None and not args.serve:
        parser.error("--config requires --serve")
    return args


def _counts(text: str) -> list[int]:
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected numbers of viewers from 1 on")
    return counts


if __name__ == "__main__":
    sys.exit(main())
