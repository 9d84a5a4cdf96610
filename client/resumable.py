# SPDX-License-Identifier: Apache-2.0
"""A session that outlives its connection, in asyncio: what VideoStream and AsyncVideoStream share.

Not used by itself. When a connection breaks, stalls or its server shuts down, it makes another one that goes on from
the session's last snapshot, and drops what comes a second time. How a connection works is `connection.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import random
import time
from collections import deque

from client import wire
from client.channel import DEFAULT_URL, Tls
from client.connection import AHEAD, Connection, Settings
from client.errors import (
    ConnectionLostError,
    InvalidRequestError,
    ServerFailedError,
    ServerShutdownError,
    SessionCancelledError,
    StallError,
    UnavailableError,
    UnknownSessionError,
    VideoStreamError,
)
from client.exchange import StreamedChunk
from longlive_serve.errors import ServeError
from longlive_serve.options import Options
from longlive_serve.protocol import Request

log = logging.getLogger(__name__)

RESUMABLE = (
    ConnectionLostError,
    StallError,
    ServerShutdownError,
    ServerFailedError,
    SessionCancelledError,  # by the server, for not reading for long; or by `close` of a connection given up
    UnavailableError,
    UnknownSessionError,
)
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 5.0  # before the second try, and at most; doubled each time


@dataclasses.dataclass(kw_only=True, eq=False)
class SentPrompt:
    """A prompt switch that the session has to keep."""

    text: str
    at_latent_frame: int | None
    accepted: float = math.inf
    """When the server's word came (monotonic): a snapshot that came later has the prompt in it."""


class ResumableStream:
    """The session of one video, over as many connections as it takes."""

    def __init__(
        self,
        prompt: str | None,
        *,
        url: str = DEFAULT_URL,
        seed: int | None = None,
        chunks: int | None = None,
        ahead: int = AHEAD,
        global_sink: bool | None = None,
        on_switch: str | None = None,
        pace: str | None = None,
        fps: int | None = None,
        frame_format: str | None = None,
        early_frames: bool | None = None,
        snapshot_every: int | None = None,
        snapshot: bytes | None = None,
        resume_for: float = 60.0,
        stall_timeout: float | None = 30.0,
        heartbeat_s: float = 300.0,
        check: bool = True,
        session_id: str | None = None,
        token: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        """
        prompt: what the video shows; None with `snapshot`, which has its own.
        chunks: how many to generate; None: until stopped.
        ahead: at most this many chunks are asked for before they are consumed: a slow consumer slows the generation
            down. (And Triton keeps what it has sent until all of a request is answered, so requests are small.)
        pace: `realtime` (the server's default): chunks come a little before they are to be shown at `fps` (16) frames
            per second; `asap`: as fast as live sessions leave time for, for work that nobody watches.
        frame_format: how frames travel: `raw` (the server's default), `jpeg` or `h264` (fewer bytes, small losses;
            needs PyAV on both sides). What comes out of here are pictures in any case.
        early_frames: `chunks()` yields a chunk in parts, each as soon as its latent frame is decoded: the first frame
            and the first one under a new prompt come earlier.
        resume_for: when the connection breaks, stalls, or its server shuts down or fails, try for this many seconds
            to go on elsewhere, with the next frame; 0: raise at once. There may be a slight jump at the seam.
        snapshot_every: every so many chunks `StreamedChunk.snapshot` holds the whole session, as bytes (default: 1
            where the session can be resumed, else never).
        snapshot: such bytes, and `token` that of their session: it goes on behind that chunk, on any server with the
            same weights. `chunks` counts from there.
        stall_timeout: seconds of silence, while an answer is due, that raise StallError; None: wait for ever. After
            half of it a heartbeat goes out: a server that lives answers it, also while the session waits for a slot.
        heartbeat_s: an empty request goes out this often, because Triton forgets a sequence that sends none.
        check: refuse a wrong request here, at once; False leaves it to the server.
        token: every request of the session repeats it, so that nobody else can steer it (default: a random one).
        """
        _check_count("chunks", chunks)
        _check_count("ahead", ahead)
        self.session_id = wire.new_session_id() if session_id is None else session_id
        self.token = wire.new_session_id() if token is None else token
        self.resumed = 0
        """How often the session went on over another connection."""
        self._settings = Settings(
            url=url, ahead=ahead, stall_timeout=stall_timeout, heartbeat_s=heartbeat_s, check=check, tls=tls
        )
        self._resume_for = resume_for
        self._owed: float = math.inf if chunks is None else chunks  # chunks asked for that have not come
        self._next_frame = -1  # -1: none came yet
        self._ready: deque[StreamedChunk] = deque()  # came, not consumed
        self._prompts: list[SentPrompt] = []  # those that no snapshot has
        every = 1 if snapshot_every is None and resume_for else snapshot_every
        how = Options(
            pace=pace, fps=fps, snapshot_every=every, token=self.token, format=frame_format, early_frames=early_frames
        )
        self._again = Request(session_id=self.session_id, start=True, options=how, snapshot=snapshot)
        options = dataclasses.replace(how, global_sink=global_sink, on_switch=on_switch)
        self._start = dataclasses.replace(self._again, prompt=prompt, seed=seed, options=options)
        self._begun = False  # an answer has come
        self._broke: float | None = None  # when the session broke off; None once it goes on
        self._tries = 0  # to go on, since it broke off
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._ended = False  # closed or cancelled
        self._resuming = asyncio.Lock()

    def cancel(self) -> None:
        """End the session at once, and with it the iteration. May be called from any thread."""
        self._ended = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the stream with it
                self._loop.call_soon_threadsafe(self._cancel)

    async def _open(self) -> None:
        if self._loop is not None:
            raise RuntimeError("a stream is opened once: make a new one")
        connection = Connection(self._start, self._settings, self._owed)
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        self._connection = connection
        if self._ended:
            raise SessionCancelledError(ServeError.CANCELLED, "cancelled by this client")
        await connection.open()

    async def _close(self) -> None:
        """End the session, and the stream. Chunks that were not consumed are dropped."""
        if self._connection is None:
            return
        polite, self._ended = not self._ended, True
        self._stop.set()
        await self._connection.close(politely=polite)

    async def _next_chunk(self) -> StreamedChunk | None:
        """The next chunk; None when all that were asked for have come, or after `cancel`."""
        while not self._ended:
            if self._ready:
                return self._ready.popleft()
            connection = self._current()
            try:
                chunk = await connection.next_chunk()
            except RESUMABLE as error:
                if self._ended or not self._owed:  # then only the word that it was the last chunk is missing
                    return None
                await self._resume(connection, error)
            else:
                if chunk is None:
                    return None
                self._take(chunk)
        return None

    def _take(self, chunk: StreamedChunk) -> None:
        """Note what has come, and keep it unless it came before."""
        self._begun = True
        if chunk.snapshot:
            self._again = dataclasses.replace(self._again, snapshot=chunk.snapshot)
            self._start = self._again
            self._prompts = [prompt for prompt in self._prompts if prompt.accepted > chunk.arrived]
        after = chunk.first_frame + len(chunk.frames)
        if not len(chunk.frames):
            self._ready.append(chunk)
        elif after > self._next_frame:
            came_before = max(0, self._next_frame - chunk.first_frame)
            self._next_frame = after
            self._owed -= chunk.completes
            self.resumed += self._broke is not None
            self._broke = None
            first = chunk.first_frame + came_before
            self._ready.append(dataclasses.replace(chunk, frames=chunk.frames[came_before:], first_frame=first))

    async def _switch_prompt(self, text: str, at_latent_frame: int | None) -> int:
        prompt = SentPrompt(text=text, at_latent_frame=at_latent_frame)
        while True:
            connection = self._current()
            try:
                return await self._send(connection, prompt)
            except RESUMABLE as error:
                await self._resume(connection, error)

    async def _send(self, connection: Connection, prompt: SentPrompt) -> int:
        word = await connection.switch_prompt(prompt.text, prompt.at_latent_frame)
        prompt.accepted = word.arrived
        if prompt not in self._prompts:
            self._prompts.append(prompt)
        return word.prompt_index

    async def _request_chunks(self, count: int) -> None:
        _check_count("chunks", count)
        self._owed += count
        connection = self._current()
        try:
            await connection.request_chunks(count)
        except RESUMABLE as error:
            await self._resume(connection, error)

    def _current(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the stream is not open: use it in a `with` block")
        return self._connection

    async def _resume(self, broken: Connection, error: VideoStreamError) -> None:
        """Go on over another connection. Raises `error` when there is nothing to go on with, or it takes too long."""
        async with self._resuming:
            if self._connection is not broken:  # somebody else has done it
                return
            for chunk in broken.received:
                self._take(chunk)
            if self._broke is None:
                self._broke, self._tries = time.monotonic(), 0
            if self._hopeless(error) or time.monotonic() - self._broke >= self._resume_for:
                raise error
            await self._back_off()
            await broken.close(politely=False)
            if self._ended:
                return
            level = logging.WARNING if self._tries == 1 else logging.DEBUG
            log.log(level, "session %s: %s; going on at frame %d", self.session_id, error, max(0, self._next_frame))
            # A new id: the server may not have noticed yet that the old connection is gone.
            self.session_id = wire.new_session_id()
            start = dataclasses.replace(self._start, session_id=self.session_id)
            self._connection = Connection(start, self._settings, self._owed)
            with contextlib.suppress(*RESUMABLE):  # whoever uses the connection next is told, and comes back here
                await self._connection.open()
                for prompt in list(self._prompts):
                    await self._send(self._connection, prompt)

    def _hopeless(self, error: VideoStreamError) -> bool:
        if not self._begun or not self._owed or self._ended:
            return True  # what never gave an answer is no session yet: then it is the address or the request
        return isinstance(error, UnavailableError) and self._next_frame < 0

    async def _back_off(self) -> None:
        """Let time pass before every try but the first; `cancel` and `close` end it."""
        if self._tries:
            delay = min(LONGEST_BACK_OFF_S, BACK_OFF_S * 2**self._tries) * random.uniform(0.5, 1.0)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), delay)
        self._tries += 1

    def _cancel(self) -> None:
        self._stop.set()
        self._ready.clear()
        self._current().cancel()


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value < 2**31:
        raise InvalidRequestError(ServeError.INVALID_REQUEST, f"{name}: got {value}, expected 1 to {2**31 - 1}")
