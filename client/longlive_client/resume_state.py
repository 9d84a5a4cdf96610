# SPDX-License-Identifier: Apache-2.0
"""How far a session has come, and what it takes to go on with it over another connection. No I/O.

Used by `resume.py`, which makes the connections, and by `retry_policy.py`, which counts them.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from longlive_client.request_tracker import StreamedChunk
from longlive_serve.protocol.messages import Request


@dataclasses.dataclass(kw_only=True, eq=False)
class SentPrompt:
    """A prompt switch that the session has to keep."""

    text: str
    at_latent_frame: int | None
    accepted: float = math.inf
    """When the server's word came (monotonic): a snapshot that came later has the prompt in it."""


class ResumeState:
    """What has come of a session, and what has not."""

    def __init__(self, start: Request, chunks: float) -> None:
        """`chunks`: how many are asked for; math.inf: until stopped."""
        self.owed = chunks
        """Chunks asked for that have not come."""
        self.ready: deque[StreamedChunk] = deque()
        """Came, not consumed."""
        self.prompts: list[SentPrompt] = []
        """Those that no snapshot has: to be sent again."""
        self.begun = False
        """An answer has come, if only that there is no slot."""
        self.next_frame = 0
        self._start = start

    def start(self, session_id: str, max_wait_s: float | None) -> Request:
        """The START that goes on from here."""
        options = dataclasses.replace(self._start.options, max_wait_s=max_wait_s)
        return dataclasses.replace(self._start, session_id=session_id, options=options)

    def take(self, chunk: StreamedChunk) -> bool:
        """Note what has come, and keep it unless it came before. Returns whether frames came that are new."""
        self.begun = True
        if chunk.snapshot:
            self._note_snapshot(chunk)
        if not len(chunk.frames):
            self.ready.append(chunk)
            return False
        came_before = max(0, self.next_frame - chunk.first_frame)
        if came_before >= len(chunk.frames):
            return False
        first = chunk.first_frame + came_before
        self.ready.append(dataclasses.replace(chunk, frames=chunk.frames[came_before:], first_frame=first))
        self.next_frame = chunk.first_frame + len(chunk.frames)
        self.owed -= chunk.completes
        return True

    def _note_snapshot(self, chunk: StreamedChunk) -> None:
        """From now on the session goes on from there. What a snapshot has is not said beside it."""
        options = dataclasses.replace(self._start.options, global_sink=None, on_switch=None)
        start = dataclasses.replace(self._start, prompt=None, seed=None, options=options)
        self._start = dataclasses.replace(start, snapshot=chunk.snapshot)
        self.prompts = [prompt for prompt in self.prompts if prompt.accepted > chunk.arrived]
