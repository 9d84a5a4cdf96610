# SPDX-License-Identifier: Apache-2.0
"""What a session has received, and how to continue it over another connection. No I/O.

Owned by `resume.py`; each connection gets its START from here and adds the chunks that it receives.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque

from longlive_client.errors import VideoStreamError
from longlive_client.wire import StreamedChunk
from longlive_serve.protocol.messages import Request


@dataclasses.dataclass(kw_only=True, eq=False)
class SentPrompt:
    """A prompt switch that a resumed session must repeat."""

    text: str
    at_latent_frame: int | None
    accept_time: float = math.inf
    """When the server acknowledged it (monotonic): a snapshot that arrived later contains the prompt."""


class ResumeState:
    """The client's state of one session."""

    def __init__(self, start: Request, chunks: float) -> None:
        """`chunks`: how many are requested; math.inf: until stopped."""
        self.remaining = chunks
        """Chunks requested that have not arrived."""
        self.queue: deque[StreamedChunk | VideoStreamError] = deque()
        """Items not consumed yet, in order; an error stands in the place of the chunks that it refused."""
        self.prompts: list[SentPrompt] = []
        """Prompts that no snapshot contains: to be sent again."""
        self.has_response = False
        """A server has answered, even if only to refuse for lack of a slot."""
        self.next_frame = 0
        self.num_resumed = 0
        """How often new frames arrived after an interruption."""
        self.failed_at: float | None = None
        """When the session lost its connection (monotonic); None while frames arrive."""
        self._start = start

    def start_request(self, session_id: str, max_wait_s: float | None) -> Request:
        """The START that continues from here."""
        options = dataclasses.replace(self._start.options, max_wait_s=max_wait_s)
        return dataclasses.replace(self._start, session_id=session_id, options=options)

    def add(self, chunk: StreamedChunk) -> None:
        """Append the new frames in `chunk` to `queue`, and keep its snapshot."""
        self.has_response = True
        if chunk.snapshot:
            self._set_snapshot(chunk)
        if not len(chunk.frames):
            self.queue.append(chunk)
            return
        num_old = max(0, self.next_frame - chunk.first_frame)
        if num_old >= len(chunk.frames):
            return
        first_frame = chunk.first_frame + num_old
        self.queue.append(dataclasses.replace(chunk, frames=chunk.frames[num_old:], first_frame=first_frame))
        self.next_frame = chunk.first_frame + len(chunk.frames)
        self.remaining -= chunk.completes
        self.num_resumed += self.failed_at is not None
        self.failed_at = None

    def _set_snapshot(self, chunk: StreamedChunk) -> None:
        """Continue from this snapshot: drop from START, and from `prompts`, what it contains."""
        options = dataclasses.replace(self._start.options, global_sink=None, on_switch=None)
        start = dataclasses.replace(self._start, prompt=None, seed=None, options=options)
        self._start = dataclasses.replace(start, snapshot=chunk.snapshot)
        self.prompts = [prompt for prompt in self.prompts if prompt.accept_time > chunk.arrived]
