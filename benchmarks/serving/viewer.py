# SPDX-License-Identifier: Apache-2.0
"""A simulated viewer: watches a session at its frame rate, switches prompts, and records latencies and stalls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Sequence

from longlive_client.cli.scenes import FRAMES_PER_CHUNK
from longlive_client.errors import UnavailableError, VideoStreamError
from longlive_client.video_stream import AsyncVideoStream, StreamedChunk, Tls
from longlive_serve.config.presets import FPS
from longlive_serve.protocol.session_options import REALTIME


@dataclasses.dataclass(frozen=True, kw_only=True)
class ViewerConfig:
    """Settings of all viewers of a run."""

    url: str
    prompts: Sequence[str]
    """Viewer i starts with prompt i and takes the next one at every switch."""
    seconds: float
    """Watch time of each viewer, from its first frame."""
    switch_interval: float
    """Seconds between switches; 0: none."""
    fps: int = FPS
    pace: str = REALTIME
    tls: Tls | None = None
    access_token: str | None = None


@dataclasses.dataclass(kw_only=True)
class ViewerStats:
    """What one viewer measured. Times in seconds."""

    first_frame_latency: float | None = None
    """From the request to the first frame; None: no frame arrived."""
    gaps: list[float] = dataclasses.field(default_factory=list)
    """Between the arrivals of chunks."""
    stalls: list[float] = dataclasses.field(default_factory=list)
    """Seconds of standstill, for each chunk that arrived after its display time."""
    switch_latencies: list[float] = dataclasses.field(default_factory=list)
    """From the request for a new prompt to its first frame."""
    chunks: int = 0
    frames: int = 0
    out_of_order: int = 0
    """Chunks whose first frame does not follow the last one."""
    start: float = 0.0
    """Arrival time of the first frame (monotonic clock)."""
    duration: float = 0.0
    """From the first frame to the last one."""
    queued: bool = False
    refused: str = ""
    failed: str = ""


class Viewer:
    """Watches one session, for `ViewerConfig.seconds` or until the session ends."""

    def __init__(self, config: ViewerConfig, index: int) -> None:
        self._config, self._index = config, index
        self._stats = ViewerStats()
        self._requested_at: dict[int, float] = {}  # prompt index -> request time
        self._last: StreamedChunk | None = None
        self._deadline = 0.0  # display time of the next chunk

    async def watch(self) -> ViewerStats:
        start = time.monotonic()
        settings = self._config
        stream = AsyncVideoStream(
            self._prompt(0),
            url=settings.url,
            seed=self._index,
            pace=settings.pace,
            fps=settings.fps,
            tls=settings.tls,
            access_token=settings.access_token,
        )
        try:
            async with stream:
                switching = asyncio.create_task(self._switch(stream))
                try:
                    async for chunk in stream.chunks():
                        self._record(chunk, start)
                        if self._stats.duration >= settings.seconds:
                            break
                finally:
                    switching.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await switching
        except UnavailableError as error:
            self._stats.refused = error.message
        except VideoStreamError as error:
            self._stats.failed = f"{type(error).__name__}: {error.message}"
        return self._stats

    def _prompt(self, num_switches: int) -> str:
        return self._config.prompts[(self._index + num_switches) % len(self._config.prompts)]

    async def _switch(self, stream: AsyncVideoStream) -> None:
        count = 0
        while self._config.switch_interval > 0:
            await asyncio.sleep(self._config.switch_interval)
            if self._last is not None:
                count += 1
                requested_at = time.monotonic()
                self._requested_at[await stream.switch_prompt(self._prompt(count))] = requested_at

    def _record(self, chunk: StreamedChunk, start: float) -> None:
        stats, last, fps = self._stats, self._last, self._config.fps
        if not len(chunk.frames):
            stats.queued = True
            return
        if last is None:
            stats.first_frame_latency = chunk.arrived - start
            stats.out_of_order += chunk.first_frame != 0
            stats.start = chunk.arrived
            self._deadline = (
                chunk.arrived + FRAMES_PER_CHUNK / fps
            )  # the first chunk is short: a viewer buffers the rest
        else:
            stats.gaps.append(chunk.arrived - last.arrived)
            stats.out_of_order += chunk.first_frame != last.first_frame + len(last.frames)
            if chunk.arrived > self._deadline:
                stats.stalls.append(chunk.arrived - self._deadline)
            self._deadline = max(self._deadline, chunk.arrived) + len(chunk.frames) / fps
            for index in [index for index in self._requested_at if index <= chunk.prompt_index]:
                stats.switch_latencies.append(chunk.arrived - self._requested_at.pop(index))
        stats.chunks += 1
        stats.frames += len(chunk.frames)
        stats.duration = chunk.arrived - stats.start
        self._last = chunk


async def run_viewers(config: ViewerConfig, viewers: int, arrival_interval: float = 0.0) -> list[ViewerStats]:
    """Run `viewers` concurrent viewers, which start `arrival_interval` seconds apart."""

    async def start_later(index: int) -> ViewerStats:
        await asyncio.sleep(index * arrival_interval)
        return await Viewer(config, index).watch()

    return await asyncio.gather(*(start_later(index) for index in range(viewers)))
