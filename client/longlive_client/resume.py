# SPDX-License-Identifier: Apache-2.0
"""A session that outlives its connection, in asyncio: what VideoStream and AsyncVideoStream share.

When a connection breaks, stalls or its server shuts down, another one continues from the session's last snapshot
(`resume_state.py`); frames received twice are dropped. When a server has no free slot, others are asked before the
session waits (`retry_policy.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Coroutine
from typing import Any

from longlive_client import wire
from longlive_client.connection import AHEAD, Connection, TransportConfig
from longlive_client.errors import InvalidRequestError, SessionCancelledError, VideoStreamError
from longlive_client.grpc_transport import DEFAULT_URL, Tls
from longlive_client.resume_state import ResumeState, SentPrompt
from longlive_client.retry_policy import MAX_ATTEMPTS, RESUMABLE, RetryPolicy
from longlive_client.wire import StreamedChunk
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import Request
from longlive_serve.protocol.session_options import Options

log = logging.getLogger(__name__)


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
        stream_partial_chunks: bool | None = None,
        snapshot_every: int | None = None,
        snapshot: bytes | None = None,
        max_attempts: int = MAX_ATTEMPTS,
        resume_for: float = 60.0,
        stall_timeout: float | None = 30.0,
        heartbeat_s: float = 300.0,
        check: bool = True,
        session_id: str | None = None,
        session_token: str | None = None,
        tls: Tls | None = None,
        access_token: str | None = None,
    ) -> None:
        """
        prompt: what the video shows; None with `snapshot`, which has its own.
        chunks: how many to generate; None: until stopped.
        ahead: maximum number of chunks that are requested and not consumed: a slow consumer slows generation down.
            (Also, Triton keeps all responses of a request in memory until the last one, so requests are small.)
        pace: `realtime` (the server's default): chunks arrive shortly before playback at `fps` (16) frames per second;
            `asap`: in the time that live sessions leave, for videos that are not watched live.
        frame_format: encoding of the frames: `raw` (the server's default), `jpeg` or `h264` (fewer bytes, small losses;
            needs PyAV on both sides). `StreamedChunk.frames` holds decoded frames in any case.
        stream_partial_chunks: `chunks()` yields a chunk in parts, each as soon as its latent frame is decoded: the
            first frame and the first one under a new prompt come earlier.
        max_attempts: number of servers to ask for a free slot, at the start and on each resume. The session waits in
            the queue of the last one; 1: of the first. Each attempt has a new session id, which load balancers hash.
        resume_for: if the connection breaks or stalls, or its server shuts down or fails, try for this many seconds to
            resume the session with the next frame; 0: raise at once. The video may jump slightly there.
        snapshot_every: number of chunks between snapshots; `StreamedChunk.snapshot` then holds the session as bytes
            (default: 1 if the session can be resumed, else never).
        snapshot: such bytes; pass the `session_token` of their session too. The session continues after that chunk, on
            any server with the same weights. `chunks` counts from there.
        stall_timeout: raise StallError after this many seconds without an expected response; None: never. A heartbeat
            is sent after half of it: a live server answers it, even while the session waits for a slot.
        heartbeat_s: seconds between empty requests, because Triton drops a sequence that sends none.
        check: raise for an invalid request before it is sent; False: the server checks it.
        session_token: a secret that every request of the session carries (default: a random one).
        access_token: access token for a proxy.
        """
        _check_count("chunks", chunks)
        _check_count("ahead", ahead)
        _check_count("max_attempts", max_attempts)
        self.session_id = wire.new_session_id() if session_id is None else session_id
        """The current one: every connection has a new one."""
        self.session_token = wire.new_session_id() if session_token is None else session_token
        self._config = TransportConfig(
            url=url,
            ahead=ahead,
            stall_timeout=stall_timeout,
            heartbeat_s=heartbeat_s,
            check=check,
            tls=tls,
            access_token=access_token,
        )
        options = Options(
            global_sink=global_sink,
            on_switch=on_switch,
            pace=pace,
            fps=fps,
            snapshot_every=1 if snapshot_every is None and resume_for else snapshot_every,
            format=frame_format,
            stream_partial_chunks=stream_partial_chunks,
            session_token=self.session_token,
        )
        start = Request(
            session_id=self.session_id, start=True, prompt=prompt, seed=seed, options=options, snapshot=snapshot
        )
        self._state = ResumeState(start, math.inf if chunks is None else chunks)
        self._retry_policy = RetryPolicy(max_attempts=max_attempts, resume_for=resume_for)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connection: Connection | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # watch a START, or close a refused session
        self._closed = False  # closed or cancelled
        self._resume_lock = asyncio.Lock()

    @property
    def resumed(self) -> int:
        """How often the session was resumed over another connection."""
        return self._state.num_resumed

    def cancel(self) -> None:
        """End the session at once, and with it the iteration. May be called from any thread."""
        self._closed = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the stream with it
                self._loop.call_soon_threadsafe(self._cancel)

    async def _open(self) -> None:
        if self._loop is not None:
            raise RuntimeError("a stream can be opened only once: create a new one")
        self._connection = self._make_connection()
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        if self._closed:
            raise SessionCancelledError(RequestError.CANCELLED, "cancelled by this client")
        await self._start(self._connection)

    async def _close(self) -> None:
        """End the session, and the stream. Chunks that were not consumed are dropped."""
        if self._connection is None:
            return
        send_end, self._closed = not self._closed, True
        self._stop.set()
        await self._connection.close(send_end=send_end)
        if send_end and self._tasks:
            await asyncio.wait(self._tasks)

    async def _next_chunk(self) -> StreamedChunk | None:
        """The next chunk; None after the last requested one, or after `cancel`."""
        while not self._closed:
            connection = self._get_connection()
            try:
                return await connection.next_chunk()
            except RESUMABLE as error:
                if self._closed or not self._state.remaining:  # only the final response is missing
                    return None
                await self._resume(connection, error)
        return None

    async def _switch_prompt(self, text: str, at_latent_frame: int | None) -> int:
        prompt = SentPrompt(text=text, at_latent_frame=at_latent_frame)
        while True:
            connection = self._get_connection()
            try:
                return await self._send_prompt(connection, prompt)
            except RESUMABLE as error:
                await self._resume(connection, error)

    async def _send_prompt(self, connection: Connection, prompt: SentPrompt) -> int:
        acknowledgement = await connection.switch_prompt(prompt.text, prompt.at_latent_frame)
        prompt.accept_time = acknowledgement.arrived
        if prompt not in self._state.prompts:
            self._state.prompts.append(prompt)
        return acknowledgement.prompt_index

    async def _request_chunks(self, count: int) -> None:
        _check_count("chunks", count)
        connection = self._get_connection()
        self._state.remaining += count
        try:
            await connection.request_remaining()
        except RESUMABLE as error:
            await self._resume(connection, error)

    def _get_connection(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("the stream is not open: use it in a `with` block")
        return self._connection

    async def _resume(self, broken: Connection, error: VideoStreamError) -> None:
        """Continue over another connection. Raises `error` if that is not possible, or not within `resume_for`."""
        async with self._resume_lock:
            if self._connection is not broken:  # another task has done it
                return
            if self._closed or not self._retry_policy.should_retry(error, self._state):
                raise error
            if self._retry_policy.is_refusal(error, self._state):  # no delay: each server is asked about once
                self._create_task(broken.close())  # Triton would keep the sequence of a session that is only cancelled
            else:
                await self._wait(self._retry_policy.next_delay(), error)
                await broken.close(send_end=False)
            if self._closed or not self._state.remaining:
                return
            # A new id leads to another server; this one may not have noticed yet that the connection broke.
            self.session_id = wire.new_session_id()
            self._connection = self._make_connection()
            with contextlib.suppress(*RESUMABLE):  # the next call on the connection raises the error, and resumes again
                await self._start(self._connection)
                for prompt in list(self._state.prompts):
                    await self._send_prompt(self._connection, prompt)

    def _make_connection(self) -> Connection:
        start = self._state.start_request(self.session_id, self._retry_policy.next_max_wait())
        return Connection(start, self._config, self._state)

    async def _start(self, connection: Connection) -> None:
        await connection.open()
        self._create_task(self._watch_start(connection))

    async def _watch_start(self, connection: Connection) -> None:
        """If the server refuses the START, ask the next one now, not only when the next chunk is consumed."""
        with contextlib.suppress(*RESUMABLE):
            error = await connection.get_refusal()
            if error is not None and self._retry_policy.is_refusal(error, self._state):
                await self._resume(connection, error)

    def _create_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait(self, seconds: float, error: VideoStreamError) -> None:
        """Log `error`, then wait for `seconds`, or until `cancel` or `close`."""
        level = logging.DEBUG if seconds else logging.WARNING
        log.log(level, "session %s: %s; continuing at frame %d", self.session_id, error, self._state.next_frame)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)

    def _cancel(self) -> None:
        self._stop.set()
        self._state.queue.clear()
        self._get_connection().cancel()


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value < 2**31:
        raise InvalidRequestError(RequestError.INVALID_REQUEST, f"{name}: got {value}, expected 1 to {2**31 - 1}")
