# SPDX-License-Identifier: Apache-2.0
"""A real Triton server: other formats than raw, frames that leave early, and what it says about itself."""

from __future__ import annotations

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlive_client.video_stream import VideoStream
from longlive_serve.backends.start_up import PHASES
from longlive_serve.triton_server.launcher import TritonServer
from tests.fakes.service_bench import wait_until
from tests.support.live import frames_of, play, start_server


@pytest.mark.numeric
@pytest.mark.parametrize("frame_format", ["jpeg", "h264"])
def test_frames_may_travel_encoded(server: TritonServer, frame_format: str) -> None:
    raw = frames_of(play(server, seed=21, chunks=3)).astype(int)
    options: dict[str, Any] = {"url": server.grpc_url, "seed": 21, "chunks": 3, "pace": "asap"}
    with VideoStream("a red fox runs", **options, frame_format=frame_format) as video:
        decoded = frames_of([chunk for chunk in video.chunks() if len(chunk.frames)]).astype(int)
    assert decoded.shape == raw.shape
    # Noise is the hardest there is to encode: near to its own frames, far from those of another video.
    other = frames_of(play(server, seed=22, chunks=3)).astype(int)
    assert np.abs(decoded - raw).mean() < 0.7 * np.abs(other - raw).mean()


def test_partial_chunks_are_the_same_video(server: TritonServer) -> None:
    whole = frames_of(play(server, seed=23, chunks=3))
    options: dict[str, Any] = {"url": server.grpc_url, "seed": 23, "chunks": 3, "pace": "asap"}
    with VideoStream("a red fox runs", **options, stream_partial_chunks=True) as video:
        parts = list(video.chunks())
    assert [len(part.frames) for part in parts] == [1, *[4] * 8]
    assert np.array_equal(frames_of(parts), whole)


def test_the_metrics_agree_with_what_a_client_saw_and_a_trace_shows_it(tmp_path: Path) -> None:
    with start_server(tmp_path, trace_dir=str(tmp_path / "traces"), log_format="json") as server:
        with VideoStream("a fox", url=server.grpc_url, chunks=1, pace="asap", session_id="watched") as video:
            video.switch_prompt("a bird")
            video.request_chunks(3)
            chunks = list(video.chunks())
        wait_until(lambda: figures(server)["live_sessions"] == 0)
        wait_until(lambda: "ended after" in server.log_text)  # the log comes by a pipe of its own
        told = figures(server)
        log = server.log_text
    assert told["chunks"] == told["chunk_seconds_count"] == 4
    assert told["frames"] == len(frames_of(chunks))
    assert told["bytes"] == frames_of(chunks).nbytes
    assert told["first_frame_seconds_count"] == told["switch_seconds_count"] == 1
    assert told["slots"] == 2
    assert told['info{backend="torch",decoder="wan",device="cpu",dtype="float32",preset="tiny",variant="base"}'] == 1
    phases = {name: value for name, value in told.items() if name.startswith("phase_seconds")}
    assert len(phases) == 4
    assert min(phases.values()) > 0
    start = {name: value for name, value in told.items() if name.startswith("start_seconds")}
    assert len(start) == len(PHASES)
    assert all(start[f'start_seconds{{phase="{name}"}}'] > 0 for name in ("import", "load", "warm_up"))
    assert re.search(r"started in \d+\.\d s: import \d+\.\d s", log)
    assert sum(phases.values()) <= told["chunk_seconds_sum"]
    (trace,) = (tmp_path / "traces").iterdir()
    assert trace.name == "watched.json"
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    assert [event["name"] for event in events if event["tid"] == "chunks"] == [f"chunk {n}" for n in range(4)]
    assert {event["name"] for event in events if event["tid"] == "phases"} == {
        "switch",
        "denoise",
        "kv_cache_update",
        "decode",
    }
    records = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    own = [record["message"] for record in records if record.get("session") == "watched"]
    assert own[0].startswith("started at chunk 0")
    assert "ended after 4 chunks (complete)" in own


def figures(server: TritonServer) -> dict[str, float]:
    """Every metric of ours, its labels (sorted) in its name if it has some."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^longlive_(\w+)(?:{([^}]*)})? (\S+)$", text, re.MULTILINE):
        ordered = ",".join(sorted(labels.split(","))) if labels else ""
        found[f"{name}{{{ordered}}}" if ordered else name] = float(value)
    return found
