# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests against a live server: the server, its metrics and resources, a client for invalid requests."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from longlive_client import wire
from longlive_client.video_stream import StreamedChunk, VideoStream
from longlive_serve.protocol.messages import CLIENT_HEADER
from longlive_serve.triton_server.launcher import TritonServer
from tests.fakes.service_bench import LIMIT_S, wait_until


def start_server(folder: Path, **settings: Any) -> TritonServer:
    """A server of the tiny preset; `settings` of serve.toml and (host, ports, TLS) of `TritonServer`."""
    own = {name: settings.pop(name) for name in list(settings) if re.match("host$|tls_|.*_port$", name)}
    config = folder / "serve.toml"
    values = {"preset": "tiny", "slots": 2, "idle_timeout_s": 600.0, "max_waiting": 100} | settings
    config.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items()), encoding="utf-8")
    return TritonServer(config=config, **own)


def metric(server: TritonServer, name: str) -> float:
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        found = re.search(rf"^longlive_{name}(?:{{.*}})? (\S+)$", response.read().decode(), re.MULTILINE)
    assert found, f"no metric longlive_{name}"
    return float(found[1])


def play(
    server: TritonServer, *, seed: int, switch: tuple[str, int] | None = None, chunks: int = 8
) -> list[StreamedChunk]:
    """The whole video of one session, with a prompt switch at a latent frame if one is given."""
    with VideoStream("a red fox runs", url=server.grpc_url, seed=seed, chunks=1, pace="asap") as video:
        if switch:
            video.switch_prompt(switch[0], at_latent_frame=switch[1])
        video.request_chunks(chunks - 1)  # after the server has the switch
        return [chunk for chunk in video.chunks() if len(chunk.frames)]  # the others report the queue position


def frames_of(chunks: list[StreamedChunk]) -> np.ndarray[Any, Any]:
    return np.concatenate([chunk.frames for chunk in chunks])


class RawStream:
    """A gRPC stream that sends arbitrary requests, like a faulty client."""

    def __init__(self, server: TritonServer, session_id: str = "", client: str = "") -> None:
        self._metadata = ((CLIENT_HEADER, client),) if client else ()
        self.session_id = session_id or wire.new_session_id()
        self._channel = grpc.insecure_channel(server.grpc_url)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def ask(self, tensors: dict[str, Any], **flags: bool) -> str:
        """Send one request on a new stream. Returns the error of the response, or an empty string."""
        return next((error for error in self.answers(1, tensors, **flags) if error), "")

    def answers(self, times: int, tensors: dict[str, Any], **flags: bool) -> Iterator[str]:
        """Send a request `times` times; yields the errors of the responses, empty if there is none."""
        messages = [wire.infer_request(self.session_id, str(number), tensors, **flags) for number in range(times)]
        for response in self._stub.ModelStreamInfer(iter(messages), timeout=LIMIT_S, metadata=self._metadata):
            yield str(response.error_message)

    def close(self) -> None:
        self._channel.close()


def text(value: str | bytes) -> np.ndarray[Any, Any]:
    return np.array([value if isinstance(value, bytes) else value.encode()], np.object_)


def children_of(pid: int) -> list[int]:
    return [
        int(child)
        for file in Path(f"/proc/{pid}/task").glob("*/children")
        for child in file.read_text(encoding="utf-8").split()
    ]


def descendants(pid: int) -> list[int]:
    return [pid, *(grandchild for child in children_of(pid) for grandchild in descendants(child))]


def stub_of(server: TritonServer) -> int:
    """The process id of the model."""
    return descendants(server.pid)[1]


def shared_memory(pid: int) -> list[str]:
    return [
        line.split()[5]
        for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()
        if "/dev/shm/" in line
    ]


def resources(server: TritonServer) -> dict[str, int]:
    """Counts of threads, open files and shared-memory segments of the server and its stub, to detect leaks."""
    pids = descendants(server.pid)
    return {
        "threads": sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        "files": sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        "shared memory": len({segment for pid in pids for segment in shared_memory(pid)}),
    }


def settled(server: TritonServer) -> dict[str, int]:
    """The server's resources without sessions, once they have been stable for two seconds."""
    wait_until(lambda: metric(server, "live_sessions") + metric(server, "waiting_sessions") == 0)
    found: dict[str, int] = {}
    while (now := resources(server)) != found:
        found = now
        time.sleep(2)
    return found
