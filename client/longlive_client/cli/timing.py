# SPDX-License-Identifier: Apache-2.0
"""How fast a video arrived, from the times at which its chunks did. Seconds throughout."""

from __future__ import annotations

import dataclasses
import time

from longlive_client.wire import StreamedChunk
from longlive_serve.config.presets import FPS


@dataclasses.dataclass(kw_only=True)
class Timing:
    """Made when the video is asked for; `add` takes its chunks in order."""

    started: float = dataclasses.field(default_factory=time.monotonic)
    frames: int = 0
    first_frame_s: float | None = None
    wall_s: float = 0.0
    """From the start to the last chunk so far."""
    prompt_index: int = 0
    switch_latencies_s: list[float] = dataclasses.field(default_factory=list)
    """Per switch: from the chunk boundary at which it was due (the last chunk of the old prompt) to the first chunk of
    the new one. It holds for switches that were sent ahead."""

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
        """Seconds of video per second: 1 or more can be watched while it is generated."""
        return self.fps / FPS
