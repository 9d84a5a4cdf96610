# SPDX-License-Identifier: Apache-2.0
"""Servers behind HAProxy with all that keeps strangers out, as docs/deploy.md has them: `python -m stress.mtls_fleet`.

Mutual TLS to the proxy and from it to the servers, and a token. While viewers watch, strangers knock, the sessions are
steered over other connections, one server is killed, and another one goes as Kubernetes makes it go (`deploy.drain`,
then SIGTERM) while new viewers come. Exit code 1 if anybody got in, lost a frame or was not found.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from tritonclient.grpc import service_pb2_grpc

from benchmarks.command_line import add_cluster_arguments, exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.__main__ import PROMPTS, server_metrics
from longlive_client import wire
from longlive_client.cli.health import probe
from longlive_client.grpc_transport import Tls, bearer, channel
from longlive_client.video_stream import AsyncVideoStream, StreamedChunk
from longlive_serve.protocol.messages import SESSION_HEADER, Request
from longlive_serve.protocol.session_options import Options
from stress.chaos import MUST_BE_ZERO, RESUME_FOR_S, Seen, leaks, left_behind, stream
from stress.haproxy_cluster import Cluster
from stress.test_pki import Keys

ROOT = Path(__file__).parents[1]
DRAIN_S = 3.0  # what preStop waits for sessions to end by themselves: ten minutes in Kubernetes
CHUNKS_MORE = 2  # that everybody gets after each event


class Audience:
    """Viewers who watch until `leave`."""

    def __init__(self, url: str, keys: Keys, fps: int) -> None:
        self.seen: list[Seen] = []
        self.streams: list[AsyncVideoStream] = []
        self._url, self._keys, self._fps = url, keys, fps
        self._over = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def come(self, count: int) -> None:
        for _ in range(count):
            seen = Seen(number=len(self.seen))
            access = {"tls": self._keys.client, "access_token": self._keys.token}
            video = stream(self._url, seen.number, fps=self._fps, resume_for=RESUME_FOR_S, **access)
            self.seen.append(seen)
            self.streams.append(video)
            self._tasks.append(asyncio.create_task(self._watch(video, seen)))

    async def more(self, chunks: int = CHUNKS_MORE) -> None:
        """Until everybody has got so many. Raises what a session ended with."""
        goals = [len(one.chunks) + chunks for one in self.seen]
        while any(len(one.chunks) < goal for one, goal in zip(self.seen, goals, strict=True)):
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.1)

    async def leave(self) -> None:
        self._over.set()
        await asyncio.gather(*self._tasks)

    @property
    def resumed(self) -> int:
        return sum(len(one.seams) for one in self.seen)

    async def _watch(self, video: AsyncVideoStream, seen: Seen) -> None:
        async with video:
            async for chunk in video.chunks():
                if len(chunk.frames):
                    seen.take(chunk, video.resumed)
                if self._over.is_set():
                    return


def strangers(url: str, server_url: str, keys: Keys) -> dict[str, bool]:
    """Who knocks at the proxy and at a server, and whether he was turned away."""
    unsigned = Tls(ca=keys.folder / "ca.crt")
    knocks: dict[str, Callable[[], object]] = {
        "proxy, no token": lambda: probe(url, 3, keys.client),
        "proxy, wrong token": lambda: probe(url, 3, keys.client, "x" + keys.token),
        "proxy, no certificate": lambda: probe(url, 3, unsigned, keys.token),
        "proxy, no TLS": lambda: probe(url, 3, None, keys.token),
        "server, no certificate": lambda: probe(server_url, 3, unsigned),
        "server, no TLS": lambda: probe(server_url, 3),
    }
    return {name: _refused(knock) for name, knock in knocks.items()}


def _refused(knock: Callable[[], object]) -> bool:
    try:
        knock()
    except ConnectionError:
        return True
    return False


def steer(url: str, video: AsyncVideoStream, keys: Keys) -> bool:
    """Send the session of `video` a prompt over a connection of its own; whether it was found."""
    request = Request(
        session_id=video.session_id, prompt=PROMPTS[0], options=Options(session_token=video.session_token)
    )
    message = wire.infer_request(video.session_id, "steer", request.to_tensors())
    headers = ((SESSION_HEADER, video.session_id), *bearer(keys.token))
    with channel(url, keys.client) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        try:
            response = next(stub.ModelStreamInfer(iter([message]), timeout=10, metadata=headers))
        except grpc.RpcError:
            return False
    return not response.error_message


def drain(cluster: Cluster, number: int) -> dict[str, float]:
    """Let a server go as a pod goes: preStop, then SIGTERM."""
    url = f"http://{cluster.servers[number].metrics_url}/metrics"
    command = [sys.executable, "-m", "deploy.drain", "--url", url, "--for", str(DRAIN_S), "--settle", "0"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    began = time.monotonic()
    cluster.end_server(number)
    return {"drained_with_sessions": int(told.split()[1]), "drain_exit_s": time.monotonic() - began}


async def watch(cluster: Cluster, keys: Keys, args: argparse.Namespace) -> dict[str, Any]:
    audience = Audience(cluster.url, keys, args.fps)
    audience.come(args.viewers)
    await audience.more()
    figures: dict[str, Any] = {"live_by_server": [_live(server.metrics_url) for server in cluster.servers]}
    figures["turned_away"] = await asyncio.to_thread(strangers, cluster.url, cluster.servers[0].grpc_url, keys)
    found = [await asyncio.to_thread(steer, cluster.url, video, keys) for video in audience.streams]
    figures["found_over_another_connection"] = sum(found)
    print("killing a server ...", file=sys.stderr)
    cluster.kill_server(0)
    await audience.more()
    await asyncio.to_thread(cluster.wait_until_healthy)
    figures["resumed_after_kill"] = audience.resumed
    print("draining a server ...", file=sys.stderr)
    going = asyncio.create_task(asyncio.to_thread(drain, cluster, 1))
    audience.come(args.late)
    figures |= await going
    await audience.more()
    await asyncio.to_thread(cluster.wait_until_healthy)
    figures["resumed_after_drain"] = audience.resumed - figures["resumed_after_kill"]
    await audience.leave()
    still = [standstill(one.chunks, args.fps) for one in audience.seen]
    return figures | {
        "frames": sum(len(chunk.frames) for one in audience.seen for chunk in one.chunks),
        "lost_frames": sum(one.lost for one in audience.seen),
        "repeated_frames": sum(one.repeated for one in audience.seen),
        "viewers_who_saw_a_stall": sum(map(bool, still)),
        "longest_stall_s": max(still),
    }


def standstill(chunks: Sequence[StreamedChunk], fps: int) -> float:
    """Seconds for which the picture stood still at most, if the video is shown from its first frame on."""
    shown_until, longest = chunks[0].arrived, 0.0
    for chunk in chunks:
        longest = max(longest, chunk.arrived - shown_until)
        shown_until = max(shown_until, chunk.arrived) + len(chunk.frames) / fps
    return longest


def _live(metrics_url: str) -> int:
    return round(server_metrics(metrics_url)["live_sessions"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="longlive-fleet-") as folder:
        config, keys = Path(folder, "serve.toml"), Keys(Path(folder, "keys"))
        slots = 2 * (args.viewers + args.late)
        config.write_text(
            f'preset = "{args.preset}"\nweights = "{args.weights}"\nslots = {slots}\nmax_utilization = 1.0\n',
            encoding="utf-8",
        )
        print(f"starting {args.servers} servers ...", file=sys.stderr)
        with Cluster(args.servers, config, keys) as cluster:
            figures = asyncio.run(watch(cluster, keys, args)) | leaks(cluster)
        left = left_behind()
    settings = {"servers": args.servers, "viewers": args.viewers, "late_viewers": args.late, "fps": args.fps}
    return settings | figures | {"shared_memory_left": left["shared_memory"], "processes_left": left["processes"]}


def complaints(figures: dict[str, Any]) -> list[str]:
    """What should not be."""
    wrong = [f"got in: {name}" for name, refused in figures["turned_away"].items() if not refused]
    wrong += [f"{name}: {figures[name]}" for name in MUST_BE_ZERO if figures[name]]
    if figures["found_over_another_connection"] < figures["viewers"]:
        wrong.append(f"found over another connection: {figures['found_over_another_connection']} sessions")
    return wrong


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    measurement = Measurement.begin("stress.mtls_fleet", argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several servers share the cores
    figures = run(args)
    Console().print_json(data=figures)
    for text in complaints(figures):
        print(text, file=sys.stderr)
    write_serving_results(measurement, args.json, figures, section="trials.fleet", code="stress/mtls_fleet.py")
    return 1 if complaints(figures) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stress.mtls_fleet", description=__doc__)
    counts = (
        ("servers", 3, "behind the proxy"),
        ("viewers", 12, "at once, from the beginning on"),
        ("late", 3, "viewers who come while a server drains"),
        ("fps", 3, "at which all watch: slow, so that few cores are enough"),
    )
    add_cluster_arguments(parser, counts)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
