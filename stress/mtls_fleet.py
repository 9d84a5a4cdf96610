# SPDX-License-Identifier: Apache-2.0
"""Tests servers behind HAProxy with the access control of docs/deploy.md: `python -m stress.mtls_fleet`.

Mutual TLS to the proxy and to the servers, and a token. While viewers watch, unauthorized clients connect, sessions get
prompts over other connections, one server is killed, and another one is stopped as in Kubernetes (`deploy.drain`, then
SIGTERM) while new viewers arrive. Exit code 1 if access was granted, a frame lost or a session not found.
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
from benchmarks.results import ROOT, Measurement
from benchmarks.serving.__main__ import PROMPTS, server_metrics
from longlive_client import wire
from longlive_client.cli.health import probe
from longlive_client.grpc_transport import Tls, auth_metadata, channel
from longlive_client.video_stream import AsyncVideoStream, StreamedChunk
from longlive_serve.protocol.messages import SESSION_HEADER, Request
from longlive_serve.protocol.session_options import Options
from stress.haproxy_cluster import Cluster
from stress.test_pki import Keys
from stress.viewers import MUST_BE_ZERO, Viewers, remaining_resources, remaining_sessions

DRAIN_S = 3.0  # preStop's wait for sessions to end; ten minutes in Kubernetes
CHUNKS_MORE = 2  # that every viewer must receive after each event


def try_without_access(url: str, server_url: str, keys: Keys) -> dict[str, bool]:
    """Call the proxy and a server without full credentials. Returns whether each call was refused."""
    no_certificate = Tls(ca=keys.folder / "ca.crt")
    calls: dict[str, Callable[[], object]] = {
        "proxy, no token": lambda: probe(url, 3, keys.client),
        "proxy, wrong token": lambda: probe(url, 3, keys.client, "x" + keys.token),
        "proxy, no certificate": lambda: probe(url, 3, no_certificate, keys.token),
        "proxy, no TLS": lambda: probe(url, 3, None, keys.token),
        "server, no certificate": lambda: probe(server_url, 3, no_certificate),
        "server, no TLS": lambda: probe(server_url, 3),
    }
    return {name: _is_refused(call) for name, call in calls.items()}


def _is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ConnectionError:
        return True
    return False


def switch_prompt(url: str, video: AsyncVideoStream, keys: Keys) -> bool:
    """Send a prompt to the session of `video` over a new connection. Returns whether the session was found."""
    request = Request(
        session_id=video.session_id, prompt=PROMPTS[0], options=Options(session_token=video.session_token)
    )
    message = wire.infer_request(video.session_id, "switch", request.to_tensors())
    headers = ((SESSION_HEADER, video.session_id), *auth_metadata(keys.token))
    with channel(url, keys.client) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        try:
            response = next(stub.ModelStreamInfer(iter([message]), timeout=10, metadata=headers))
        except grpc.RpcError:
            return False
    return not response.error_message


def drain(cluster: Cluster, number: int) -> dict[str, float]:
    """Stop a server like a pod: preStop, then SIGTERM."""
    url = f"http://{cluster.servers[number].metrics_url}/metrics"
    command = [sys.executable, "-m", "deploy.drain", "--url", url, "--for", str(DRAIN_S), "--settle", "0"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    began = time.monotonic()
    cluster.end_server(number)
    return {"drained_with_sessions": int(told.split()[1]), "drain_exit_s": time.monotonic() - began}


async def watch(cluster: Cluster, keys: Keys, args: argparse.Namespace) -> dict[str, Any]:
    viewers = Viewers(cluster.url, fps=args.fps, tls=keys.client, access_token=keys.token)
    viewers.start(args.viewers)
    await viewers.wait_for_chunks(CHUNKS_MORE)
    results: dict[str, Any] = {"live_by_server": [_live_sessions(server.metrics_url) for server in cluster.servers]}
    results["turned_away"] = await asyncio.to_thread(try_without_access, cluster.url, cluster.servers[0].grpc_url, keys)
    counts = [await asyncio.to_thread(switch_prompt, cluster.url, stream, keys) for stream in viewers.streams]
    results["found_over_another_connection"] = sum(counts)
    print("killing a server ...", file=sys.stderr)
    cluster.kill_server(0)
    await viewers.wait_for_chunks(CHUNKS_MORE)
    await asyncio.to_thread(cluster.wait_until_healthy)
    results["resumed_after_kill"] = viewers.resumed
    print("draining a server ...", file=sys.stderr)
    draining = asyncio.create_task(asyncio.to_thread(drain, cluster, 1))
    viewers.start(args.late)
    results |= await draining
    await viewers.wait_for_chunks(CHUNKS_MORE)
    await asyncio.to_thread(cluster.wait_until_healthy)
    results["resumed_after_drain"] = viewers.resumed - results["resumed_after_kill"]
    await viewers.stop()
    stalls = [longest_stall(log.chunks, args.fps) for log in viewers.logs]
    return results | {
        **viewers.results(),
        "viewers_who_saw_a_stall": sum(map(bool, stalls)),
        "longest_stall_s": max(stalls),
    }


def longest_stall(chunks: Sequence[StreamedChunk], fps: int) -> float:
    """The longest standstill in seconds, for a video that is played from its first frame on."""
    shown_until, longest = chunks[0].arrived, 0.0
    for chunk in chunks:
        longest = max(longest, chunk.arrived - shown_until)
        shown_until = max(shown_until, chunk.arrived) + len(chunk.frames) / fps
    return longest


def _live_sessions(metrics_url: str) -> int:
    return round(server_metrics(metrics_url)["live_sessions"])


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="longlive-fleet-") as folder:
        config, keys = Path(folder, "serve.toml"), Keys(Path(folder, "keys"))
        slots = 2 * (args.viewers + args.late)
        settings = f'preset = "{args.preset}"\nweights = "{args.weights}"\nslots = {slots}\nmax_utilization = 1.0\n'
        config.write_text(settings, encoding="utf-8")
        print(f"starting {args.servers} servers ...", file=sys.stderr)
        with Cluster(args.servers, config, keys) as cluster:
            results = asyncio.run(watch(cluster, keys, args)) | remaining_sessions(cluster)
    counts = {"servers": args.servers, "viewers": args.viewers, "late_viewers": args.late, "fps": args.fps}
    return counts | results | remaining_resources()


def failures(results: dict[str, Any]) -> list[str]:
    """The violated requirements."""
    errors = [f"not refused: {name}" for name, refused in results["turned_away"].items() if not refused]
    errors += [f"{name}: {results[name]}" for name in MUST_BE_ZERO if results[name]]
    if results["found_over_another_connection"] < results["viewers"]:
        errors.append(f"found over another connection: {results['found_over_another_connection']} sessions")
    return errors


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    measurement = Measurement.begin("stress.mtls_fleet", argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # several servers share the cores
    results = run(args)
    Console().print_json(data=results)
    for text in failures(results):
        print(text, file=sys.stderr)
    write_serving_results(measurement, args.json, results, section="trials.fleet", code="stress/mtls_fleet.py")
    return 1 if failures(results) else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m stress.mtls_fleet", description=__doc__)
    counts = (
        ("servers", 3, "number behind the proxy"),
        ("viewers", 12, "viewers from the start"),
        ("late", 3, "viewers that start while a server drains"),
        ("fps", 3, "playback rate, low to need few cores"),
    )
    add_cluster_arguments(parser, counts)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
