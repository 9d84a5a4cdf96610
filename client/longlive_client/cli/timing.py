# SPDX-License-Identifier: Apache-2.0
"""Frame rate and latencies of a video, from the arrival times of its chunks. All times are in seconds."""

from __future__ import annotations

import dataclasses
import time

from longlive_client.wire import StreamedChunk
from longlive_serve.config.presets import FPS


@dataclasses.dataclass(kw_only=True)
class Timing:
    """Create it when the video is requested; `add` takes its chunks in order."""

    started: float = dataclasses.field(default_factory=time.monotonic)
    frames: int = 0
    first_frame_s: float | None = None
    wall_s: float = 0.0
    """From the start to the last chunk so far."""
    prompt_index: int = 0
    switch_latencies_s: list[float] = dataclasses.field(default_factory=list)
    """For each switch: time from the last chunk of the old prompt to the first chunk of the new one. Valid for switches
    that were sent before they were due."""

    def add(self, chunk: StreamedChunk) -> None:
        if not len(chunk.frames):
            return
        arrived = chunk.arrived - self.started
        if self.first_frame_s is None:
            self.first_frame_s = arrived
        elif chunk.prompt_index != self.prompt_index:
            self.switch_latencies_s.append(arrived - self.wall_s)
        self.prompt_index = chunk.prompt_index
        self.frames += len(chunk.frames)
        self.wall_s = arrived

    @property
    def fps(self) -> float:
        return self.frames / self.wall_s if self.wall_s else 0.0

    @property
    def real_time_factor(self) -> float:
        """Seconds of video per second; 1 or more is real time."""
        return self.fps / FPS
