# SPDX-License-Identifier: Apache-2.0
"""One simulated viewer: watches a session at its frame rate, switches prompts, and notes what a person would notice."""

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
class Watching:
    """What all viewers of a run do."""

    url: str
    prompts: Sequence[str]
    """Each viewer begins with another one and goes on to the next at every switch."""
    seconds: float
    """How long each watches, from its first frame on."""
    switch_every: float
    """Seconds between switches; 0: none."""
    fps: int = FPS
    pace: str = REALTIME
    tls: Tls | None = None
    access_token: str | None = None


@dataclasses.dataclass(kw_only=True)
class Seen:
    """What one viewer saw. Seconds throughout."""

    first_frame: float | None = None
    """From the request to the first frame; None: none came."""
    gaps: list[float] = dataclasses.field(default_factory=list)
    """Between the arrivals of chunks."""
    stalls: list[float] = dataclasses.field(default_factory=list)
    """How long the picture stood still, each time that a chunk was not there when it was to be shown."""
    switches: list[float] = dataclasses.field(default_factory=list)
    """From the request for a new prompt to its first frame."""
    chunks: int = 0
    frames: int = 0
    disordered: int = 0
    """Chunks that did not begin with the frame after the last one."""
    began: float = 0.0
    """When the first frame came (monotonic)."""
    lasted: float = 0.0
    """From the first frame to the last one."""
    queued: bool = False
    refused: str = ""
    failed: str = ""


class Viewer:
    """Watches one session; `watch` returns when its time is over or the session is."""

    def __init__(self, watching: Watching, number: int) -> None:
        self._watching, self._number = watching, number
        self._seen = Seen()
        self._asked: dict[int, float] = {}  # prompt index -> when it was asked for
        self._last: StreamedChunk | None = None
        self._due = 0.0  # when the next chunk is to be shown

    async def watch(self) -> Seen:
        began = time.monotonic()
        settings = self._watching
        stream = AsyncVideoStream(
            self._prompt(0),
            url=settings.url,
            seed=self._number,
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
                        self._note(chunk, began)
                        if self._seen.lasted >= settings.seconds:
                            break
                finally:
                    switching.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await switching
        except UnavailableError as error:
            self._seen.refused = error.message
        except VideoStreamError as error:
            self._seen.failed = f"{type(error).__name__}: {error.message}"
        return self._seen

    def _prompt(self, switches: int) -> str:
        return self._watching.prompts[(self._number + switches) % len(self._watching.prompts)]

    async def _switch(self, stream: AsyncVideoStream) -> None:
        count = 0
        while self._watching.switch_every > 0:
            await asyncio.sleep(self._watching.switch_every)
            if self._last is not None:
                count += 1
                asked = time.monotonic()
                self._asked[await stream.switch_prompt(self._prompt(count))] = asked

    def _note(self, chunk: StreamedChunk, began: float) -> None:
        seen, last, fps = self._seen, self._last, self._watching.fps
        if not len(chunk.frames):
            seen.queued = True
            return
        if last is None:
            seen.first_frame = chunk.arrived - began
            seen.disordered += chunk.first_frame != 0
            seen.began = chunk.arrived
            self._due = chunk.arrived + FRAMES_PER_CHUNK / fps  # the first chunk is short: a viewer buffers the rest
        else:
            seen.gaps.append(chunk.arrived - last.arrived)
            seen.disordered += chunk.first_frame != last.first_frame + len(last.frames)
            if chunk.arrived > self._due:
                seen.stalls.append(chunk.arrived - self._due)
            self._due = max(self._due, chunk.arrived) + len(chunk.frames) / fps
            for index in [index for index in self._asked if index <= chunk.prompt_index]:
                seen.switches.append(chunk.arrived - self._asked.pop(index))
        seen.chunks += 1
        seen.frames += len(chunk.frames)
        seen.lasted = chunk.arrived - seen.began
        self._last = chunk


async def watch_together(watching: Watching, viewers: int, apart: float = 0.0) -> list[Seen]:
    """Let some viewers watch at once; each comes `apart` seconds after the one before."""

    async def later(number: int) -> Seen:
        await asyncio.sleep(number * apart)
        return await Viewer(watching, number).watch()

    return await asyncio.gather(*(later(number) for number in range(viewers)))
