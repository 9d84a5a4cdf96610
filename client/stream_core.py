# SPDX-License-Identifier: Apache-2.0
"""One session over one gRPC stream, in asyncio: what VideoStream and AsyncVideoStream share.

Not used by itself. It knows time limits and connections; what the messages say is `exchange.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from client import wire
from client.errors import (
    ConnectionLostError,
    InvalidRequestError,
    SessionCancelledError,
    SessionExistsError,
    StallError,
    VideoStreamError,
)
from client.exchange import Exchange, OpenRequest, StreamedChunk
from longlive_serve.protocol import Options, Request, ServeError

DEFAULT_URL = "127.0.0.1:8001"
CLOSE_TIMEOUT_S = 5.0  # how long a polite end may take before the stream is cancelled

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A connection of its own, so that a load balancer may put each session on another server.
    ("grpc.use_local_subchannel_pool", 1),
)


class StreamCore:
    """The session of one video."""

    def __init__(
        self,
        prompt: str | None,
        *,
        url: str = DEFAULT_URL,
        seed: int | None = None,
        chunks: int | None = None,
        ahead: int | None = None,
        global_sink: bool | None = None,
        on_switch: str | None = None,
        pace: str | None = None,
        fps: int | None = None,
        snapshot_every: int | None = None,
        snapshot: bytes | None = None,
        stall_timeout: float | None = 30.0,
        heartbeat_s: float = 300.0,
        check: bool = True,
        session_id: str | None = None,
    ) -> None:
        """
        prompt: what the video shows; None with `snapshot`, which has its own.
        chunks: how many to generate; None: until stopped.
        ahead: at most this many chunks are asked for before they are consumed, so that a slow consumer slows the
            generation down. None: the server runs free, and what is not consumed is kept here. (Not reading would
            not help: Triton then keeps the responses, without a bound.)
        pace: `realtime` (the server's default): chunks come a little before they are to be shown at `fps` (16) frames
            per second; `asap`: as fast as live sessions leave time for, for work that nobody watches.
        snapshot_every: every so many chunks `StreamedChunk.snapshot` holds the whole session, as bytes.
        snapshot: such bytes: the session goes on behind that chunk, on any server with the same weights. `chunks`
            counts from there. There may be a slight jump at the seam.
        stall_timeout: seconds of silence, while an answer is due, that raise StallError; None: wait for ever. After
            half of it a heartbeat goes out: a server that lives answers it, also while the session waits for a slot.
        heartbeat_s: an empty request goes out this often, because Triton forgets a sequence that sends none.
        check: refuse a wrong request here, at once; False leaves it to the server.
        """
        _check_count("chunks", chunks)
        _check_count("ahead", ahead)
        self.session_id = wire.new_session_id() if session_id is None else session_id
        self._url = url
        self._wanted: float = math.inf if chunks is None else chunks  # not yet asked for
        self._ahead = ahead
        options = Options(
            global_sink=global_sink, on_switch=on_switch, pace=pace, fps=fps, snapshot_every=snapshot_every
        )
        self._start = Request(
            session_id=self.session_id, start=True, prompt=prompt, seed=seed, options=options, snapshot=snapshot
        )
        self._stall_timeout = stall_timeout
        self._heartbeat_s = heartbeat_s
        self._exchange = Exchange(self.session_id, check=check)
        self._heard = 0.0  # when the last response came
        self._probed = 0.0  # when a heartbeat was last sent because of a silence
        self._closing = False
        self._cancelled = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def cancel(self) -> None:
        """End the session at once, and with it the iteration. May be called from any thread."""
        self._cancelled = True
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the stream with it
                self._loop.call_soon_threadsafe(self._cancel)

    async def _open(self) -> None:
        if self._loop is not None:
            raise RuntimeError("a stream is opened once: make a new one")
        _, message = self._exchange.ask(dataclasses.replace(self._start, chunks=self._portion()))
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._writing = asyncio.Lock()
        self._channel = grpc.aio.insecure_channel(self._url, options=_CHANNEL_OPTIONS)
        self._call = service_pb2_grpc.GRPCInferenceServiceStub(self._channel).ModelStreamInfer()
        self._reader = asyncio.create_task(self._read())
        self._heart = asyncio.create_task(self._beat())
        try:
            if self._cancelled:
                self._cancel()
            await self._write(message)
        except BaseException:
            await self._close()
            raise

    async def _close(self) -> None:
        """End the session, and the stream. Chunks that were not consumed are dropped."""
        if self._loop is None or self._closing:
            return
        self._closing = True
        self._heart.cancel()
        try:
            # A session that failed is ended too, or Triton would keep a place for it; but not somebody else's.
            if not (self._call.done() or isinstance(self._exchange.failure, SessionExistsError)):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    _, message = self._exchange.ask(Request(session_id=self.session_id, end=True))
                    await self._write(message)
                    await self._wait_until(lambda: self._exchange.quiet)
        except (VideoStreamError, TimeoutError):
            pass  # it is cancelled below, which ends a session too
        finally:
            self._exchange.fail(_cancelled("the stream was closed"))
            self._call.cancel()
            await self._reader
            await self._channel.close()
            del self._call, self._channel, self._reader, self._heart  # gRPC keeps the connection until they are gone

    async def _next_chunk(self) -> StreamedChunk | None:
        """The next chunk; None when all that were asked for have come, or after `cancel`."""
        exchange = self._exchange
        if exchange.failure is None:
            with contextlib.suppress(VideoStreamError):  # raised below, after the chunks that did come
                await self._top_up()
        await self._wait_until(lambda: bool(exchange.received or not exchange.streaming))
        if self._cancelled or self._closing:
            return None
        if not exchange.received:
            if exchange.failure is not None and (exchange.cut_short or self._wanted):
                raise exchange.failure
            return None
        item = exchange.received.popleft()
        if isinstance(item, VideoStreamError):
            raise item
        return item

    async def _switch_prompt(self, text: str, at_latent_frame: int | None) -> int:
        options = Options(at_latent_frame=at_latent_frame)
        request = await self._send(Request(session_id=self.session_id, prompt=text, options=options))
        await self._wait_until(lambda: request.closed or request.acknowledgement is not None)
        if request.error is not None:
            raise request.error
        if request.acknowledgement is None:
            raise VideoStreamError.of(ServeError(ServeError.INTERNAL, "the prompt was answered by no acknowledgement"))
        return request.acknowledgement.prompt_index

    async def _request_chunks(self, count: int) -> None:
        _check_count("chunks", count)
        self._wanted += count
        await self._top_up()

    async def _top_up(self) -> None:
        """Ask for the chunks that are wanted, as far as `ahead` allows."""
        chunks = self._portion()
        if chunks != 0:
            await self._send(Request(session_id=self.session_id, chunks=chunks))

    def _portion(self) -> int | None:
        """How many chunks to ask for now (None: until stopped), taken off those still wanted."""
        room = math.inf if self._ahead is None else self._ahead - self._exchange.outstanding
        portion = max(0, min(self._wanted, room))
        if portion == math.inf:
            self._wanted = 0
            return None
        self._wanted -= portion
        return int(portion)

    async def _send(self, request: Request) -> OpenRequest:
        if self._loop is None:
            raise RuntimeError("the stream is not open: use it in a `with` block")
        if self._exchange.failure is not None:
            raise self._exchange.failure
        opened, message = self._exchange.ask(request)
        await self._write(message)
        return opened

    async def _write(self, message: Any) -> None:
        try:
            async with self._writing:
                await self._call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            if not self._call.done():
                raise  # this task was cancelled, not the stream
            await self._reader  # it learns why
            assert self._exchange.failure is not None
            raise self._exchange.failure from None

    async def _read(self) -> None:
        """Take in the responses as they come: an acknowledgement must never wait behind unread chunks."""
        error: VideoStreamError
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._heard = time.monotonic()
                self._exchange.receive(response)
                if self._closing:
                    self._exchange.received.clear()
                self._changed.set()
            error = self._lost("the server closed it")
        except grpc.aio.AioRpcError as rpc_error:
            error = self._lost(f"{rpc_error.code().name}: {rpc_error.details()}")
        except asyncio.CancelledError:
            error = _cancelled("cancelled by this client")
        self._exchange.fail(error)
        self._changed.set()

    async def _beat(self) -> None:
        while self._exchange.failure is None:
            await asyncio.sleep(self._heartbeat_s)
            await self._send_heartbeat()

    async def _send_heartbeat(self) -> None:
        with contextlib.suppress(VideoStreamError):  # whoever waits for the stream is told by the reader
            await self._send(Request(session_id=self.session_id))

    async def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for responses until `ready`. Raises StallError after `stall_timeout` without any."""
        since = time.monotonic()
        while not ready():
            limit = None
            if self._stall_timeout is not None:
                since = max(since, self._heard)
                limit = await self._patience(since, self._stall_timeout)
                if ready():
                    return
            self._changed.clear()  # nothing runs between ready() and wait(), so no change is missed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._changed.wait()

    async def _patience(self, since: float, timeout: float) -> float:
        """Seconds to wait for a response when the last one came at `since`; then ask again."""
        quiet = time.monotonic() - since
        if quiet >= timeout:
            raise StallError(
                f"{self._url}: no response for {timeout:g} s while one was due; "
                "the server hangs or the network is cut, start a new session"
            )
        if quiet >= timeout / 2 and self._probed <= since:
            self._probed = time.monotonic()
            await self._send_heartbeat()
        return timeout - quiet if self._probed > since else timeout / 2 - quiet

    def _cancel(self) -> None:
        self._exchange.received.clear()
        self._exchange.fail(_cancelled("cancelled by this client"))
        self._call.cancel()
        self._changed.set()

    def _lost(self, reason: str) -> ConnectionLostError:
        if not self._heard:
            return ConnectionLostError(
                f"{self._url}: cannot be reached ({reason}); check that the server runs there and that this is the "
                "host:port of its gRPC endpoint (8001 unless changed)"
            )
        return ConnectionLostError(
            f"{self._url}: the stream broke after {self._exchange.chunks} chunks ({reason}); "
            "the session is lost with it, start a new one"
        )


def _check_count(name: str, value: int | None) -> None:
    if value is not None and not 1 <= value < 2**31:
        raise InvalidRequestError(ServeError.INVALID_REQUEST, f"{name}: got {value}, expected 1 to {2**31 - 1}")


def _cancelled(message: str) -> SessionCancelledError:
    return SessionCancelledError(ServeError.CANCELLED, message)
