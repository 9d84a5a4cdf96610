# SPDX-License-Identifier: Apache-2.0
"""Viewers that count frames, and checks for leaked sessions and resources. Used by the stress tests."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.serving.__main__ import PROMPTS, server_metrics
from longlive_client.video_stream import AsyncVideoStream, StreamedChunk
from stress.haproxy_cluster import Cluster

RESUME_FOR_S = 240.0
MUST_BE_ZERO = ("lost_frames", "repeated_frames", "sessions_left", "shared_memory_left", "processes_left")


@dataclasses.dataclass(kw_only=True)
class ViewerLog:
    """What one viewer received."""

    index: int
    chunks: list[StreamedChunk] = dataclasses.field(default_factory=list)
    resumed_at: list[int] = dataclasses.field(default_factory=list)
    """Indices of the first chunks after each resume on another server."""
    lost: int = 0
    """Frames that did not arrive."""
    repeated: int = 0
    """Frames that arrived twice or out of order."""

    def add(self, chunk: StreamedChunk, resumed: int) -> None:
        last = self.chunks[-1] if self.chunks else None
        expected = last.first_frame + len(last.frames) if last else 0
        self.lost += max(0, chunk.first_frame - expected)
        self.repeated += max(0, expected - chunk.first_frame)
        if resumed > len(self.resumed_at):
            self.resumed_at.append(len(self.chunks))
        self.chunks.append(chunk)


def open_stream(url: str, index: int, **settings: Any) -> AsyncVideoStream:
    return AsyncVideoStream(PROMPTS[index % len(PROMPTS)], url=url, seed=index, **settings)


class Viewers:
    """Concurrent viewers that watch until `stop`."""

    def __init__(self, url: str, **settings: Any) -> None:
        self.logs: list[ViewerLog] = []
        self.streams: list[AsyncVideoStream] = []
        self._url, self._settings = url, settings
        self._done = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, count: int) -> None:
        for _ in range(count):
            log = ViewerLog(index=len(self.logs))
            stream = open_stream(self._url, log.index, resume_for=RESUME_FOR_S, **self._settings)
            self.logs.append(log)
            self.streams.append(stream)
            self._tasks.append(asyncio.create_task(self._watch(stream, log)))

    async def wait_for_chunks(self, count: int) -> None:
        """Wait until every viewer has received `count` more chunks. Raises the error of a failed session."""
        targets = [len(log.chunks) + count for log in self.logs]
        while any(len(log.chunks) < target for log, target in zip(self.logs, targets, strict=True)):
            for task in self._tasks:
                if task.done():
                    task.result()
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        self._done.set()
        await asyncio.gather(*self._tasks)

    @property
    def resumed(self) -> int:
        return sum(len(log.resumed_at) for log in self.logs)

    def results(self) -> dict[str, int]:
        return {
            "frames": sum(len(chunk.frames) for log in self.logs for chunk in log.chunks),
            "lost_frames": sum(log.lost for log in self.logs),
            "repeated_frames": sum(log.repeated for log in self.logs),
        }

    async def _watch(self, stream: AsyncVideoStream, log: ViewerLog) -> None:
        async with stream:
            async for chunk in stream.chunks():
                if len(chunk.frames):
                    log.add(chunk, stream.resumed)
                if self._done.is_set():
                    return


def remaining_sessions(cluster: Cluster) -> dict[str, float]:
    """Sessions that the servers still hold after all viewers have left; waits up to 30 s."""
    end = time.monotonic() + 30
    while True:
        metrics = [server_metrics(server.metrics_url) for server in cluster.servers]
        sessions = sum(one["live_sessions"] + one["waiting_sessions"] for one in metrics)
        if not sessions or time.monotonic() > end:
            return {"sessions_left": sessions, "failed_sessions": sum(one["failed_sessions"] for one in metrics)}
        time.sleep(0.5)


def remaining_resources() -> dict[str, int]:
    """Leaked shared memory and processes of this process's servers; waits up to 60 s for killed ones."""
    end = time.monotonic() + 60
    while (count := count_resources()) and time.monotonic() < end:
        time.sleep(0.2)
    return {"shared_memory_left": count["shared_memory"], "processes_left": count["processes"]}


def count_resources() -> Counter[str]:
    prefix = f"longlive_{os.getpid()}_"  # prefix of the names of the servers' shared memory
    count = Counter({"shared_memory": len(list(Path("/dev/shm").glob(f"{prefix}*")))})
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            count["processes"] += prefix.encode() in command.read_bytes()
    return +count
