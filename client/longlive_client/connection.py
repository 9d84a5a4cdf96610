# SPDX-License-Identifier: Apache-2.0
"""One session over one gRPC stream, in asyncio, until either ends.

Used by `resume.py`, which opens another connection when this one breaks. It handles gRPC and timeouts;
`request_tracker.py` matches responses to requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from longlive_client.errors import (
    ConnectionLostError,
    ForbiddenError,
    SessionCancelledError,
    SessionExistsError,
    StallError,
    VideoStreamError,
)
from longlive_client.grpc_transport import Tls, access_error, aio_channel, auth_metadata
from longlive_client.proxies import proxy_hint
from longlive_client.request_tracker import OpenRequest, RequestTracker
from longlive_client.resume_state import ResumeState
from longlive_client.wire import StreamedChunk
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import SESSION_HEADER, Request
from longlive_serve.protocol.session_options import RAW, Options

ERROR_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0  # for an END; then the stream is cancelled
AHEAD = 8  # default limit of chunks that are requested and not consumed
CONFIRM_EVERY = 8  # chunks consumed without a request, after which a heartbeat tells the server that they are read

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A connection for each session, so that a load balancer can distribute sessions over servers.
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportConfig:
    """How a session reaches its server; `VideoStream` explains each."""

    url: str
    ahead: int
    stall_timeout: float | None
    heartbeat_s: float
    check: bool
    tls: Tls | None
    access_token: str | None


class Connection:
    """One session over one gRPC stream."""

    def __init__(self, start: Request, config: TransportConfig, state: ResumeState) -> None:
        """`start`: the session's first request. Chunks are added to `state`, which says how many remain."""
        self._start = start
        self._config = config
        self._state = state
        self._tracker = RequestTracker(state, start.options.format or RAW, check=config.check)
        self._last_response = 0.0  # monotonic seconds; 0: none
        self._last_probe = 0.0  # when a heartbeat last probed a silent server
        self._num_consumed = 0  # chunks consumed since the last request
        self._is_open = False

    async def open(self) -> None:
        """Connect and send the START. Raises InvalidRequestError if it is invalid."""
        chunks = int(min(self._state.remaining, self._config.ahead))
        self._start_request, message = self._tracker.add(dataclasses.replace(self._start, chunks=chunks))
        self._changed = asyncio.Event()
        self._write_lock = asyncio.Lock()
        self._writes: set[asyncio.Future[None]] = set()
        self._channel = aio_channel(self._config.url, self._config.tls, _CHANNEL_OPTIONS)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        headers = ((SESSION_HEADER, self._start.session_id), *auth_metadata(self._config.access_token))
        self._call = stub.ModelStreamInfer(metadata=headers)
        self._reader = asyncio.create_task(self._read())
        self._heartbeats = asyncio.create_task(self._run_heartbeats())
        self._is_open = True
        try:
            await self._write(message)
        except BaseException:
            await self.close()
            raise

    async def close(self, *, send_end: bool = True) -> None:
        """End the stream, and with `send_end` the session by an END. Chunks that were not consumed are dropped."""
        if not self._is_open or self._tracker.is_closed:
            return
        self._tracker.is_closed = True
        self._heartbeats.cancel()
        try:
            # A failed session needs an END too: Triton keeps its sequence. But not a session of another client.
            if send_end and not (self._call.done() or isinstance(self._tracker.failure, SessionExistsError)):
                async with asyncio.timeout(CLOSE_TIMEOUT_S):
                    _, message = self._tracker.add(self._request(end=True))
                    await self._write(message)
                    await self._wait_until(lambda: self._tracker.is_idle)
        except (VideoStreamError, TimeoutError):
            pass  # the cancellation below ends the session too
        finally:
            self._tracker.fail(_cancelled("the stream was closed"))
            self._call.cancel()
            await self._reader
            await self._channel.close()
            del (self._call, self._channel, self._reader, self._heartbeats)  # references keep the connection open

    async def get_refusal(self) -> VideoStreamError | None:
        """Wait for the first answer to the START, and return it if it is an error."""
        await self._wait_until(lambda: self._start_request.has_response or self._start_request.closed)
        return self._start_request.error

    async def next_chunk(self) -> StreamedChunk | None:
        """The next chunk; None after the last requested one. Raises the error that ended the session too early."""
        tracker, queue = self._tracker, self._state.queue
        if tracker.failure is None:
            with contextlib.suppress(VideoStreamError):  # raised below, after the chunks that were received
                await self.request_remaining()
                if self._num_consumed >= CONFIRM_EVERY and tracker.is_streaming:
                    await self._send_heartbeat()
        await self._wait_until(lambda: bool(queue or not tracker.is_streaming))
        if not queue:
            if tracker.failure is not None and self._state.remaining:
                raise tracker.failure
            return None
        item = queue.popleft()
        if isinstance(item, VideoStreamError):
            raise item
        self._num_consumed += 1
        return item

    async def switch_prompt(self, text: str, at_latent_frame: int | None) -> StreamedChunk:
        """Send a prompt. Returns the server's acknowledgement, which holds the prompt's index."""
        request = await self._send(self._request(prompt=text, at_latent_frame=at_latent_frame))
        await self._wait_until(lambda: request.closed or request.acknowledgement is not None)
        if request.error is not None:
            raise request.error
        if request.acknowledgement is None:
            raise VideoStreamError.of(RequestError(RequestError.INTERNAL, "the prompt was not acknowledged"))
        return request.acknowledgement

    async def request_remaining(self) -> None:
        """Request remaining chunks, up to the limit `ahead`."""
        num_received = sum(isinstance(item, StreamedChunk) and item.completes for item in self._state.queue)
        chunks = min(self._state.remaining, self._config.ahead - num_received) - self._tracker.num_requested
        if chunks > 0:
            await self._send(self._request(chunks=int(chunks)))

    def _request(self, *, at_latent_frame: int | None = None, **fields: Any) -> Request:
        options = Options(session_token=self._start.options.session_token, at_latent_frame=at_latent_frame)
        return Request(session_id=self._start.session_id, options=options, **fields)

    async def _send(self, request: Request) -> OpenRequest:
        if self._tracker.failure is not None:
            raise self._tracker.failure
        open_request, message = self._tracker.add(request)
        self._num_consumed = 0
        await self._write(message)
        return open_request

    async def _write(self, message: Any) -> None:
        """Write a message. Cancelling this coroutine does not cancel the write, which would end the call."""
        write = asyncio.ensure_future(self._write_message(self._call, message))
        self._writes.add(write)
        write.add_done_callback(self._writes.discard)
        write.add_done_callback(lambda done: done.cancelled() or done.exception())  # mark the error as retrieved
        await asyncio.shield(write)

    async def _write_message(self, call: Any, message: Any) -> None:
        async with self._write_lock:
            write = asyncio.ensure_future(call.write(message))
            try:  # gRPC never ends a write if the call is cancelled before it is connected; the reader ends
                await asyncio.wait((write, self._reader), return_when=asyncio.FIRST_COMPLETED)
            finally:
                write.cancel()
        if write.done():
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
                write.result()
                return
        await self._reader  # sets `failure`
        assert self._tracker.failure is not None
        raise self._tracker.failure

    async def _read(self) -> None:
        """Receive responses as they arrive: an acknowledgement must not wait behind unread chunks."""
        error: VideoStreamError
        try:
            while (response := await self._call.read()) is not grpc.aio.EOF:
                self._last_response = time.monotonic()
                self._tracker.receive(response)
                self._changed.set()
            error = self._make_error("the server closed it")
        except grpc.aio.AioRpcError as rpc_error:
            why = rpc_error if self._last_response else await self._find_error(rpc_error)
            refusal = access_error(self._config.url, why.code())
            lost = f"{why.code().name}: {why.details()}"
            error = ForbiddenError(RequestError.FORBIDDEN, refusal) if refusal else self._make_error(lost)
        except asyncio.CancelledError:
            error = _cancelled("cancelled by this client")
        self._tracker.fail(error)
        self._changed.set()

    async def _find_error(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The reason why the stream ended before any response.

        A proxy that rejects the stream answers and resets it at once, and gRPC may report only the reset. A unary call
        then returns the reason.
        """
        if error.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL):
            stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            headers = auth_metadata(self._config.access_token)
            try:
                await stub.ServerLive(service_pb2.ServerLiveRequest(), metadata=headers, timeout=ERROR_TIMEOUT_S)
            except grpc.aio.AioRpcError as other:
                if other.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE):
                    return other
        return error

    async def _run_heartbeats(self) -> None:
        while self._tracker.failure is None:
            await asyncio.sleep(self._config.heartbeat_s)
            if not self._state.queue:  # else the server would take unread chunks as read
                await self._send_heartbeat()

    async def _send_heartbeat(self) -> None:
        with contextlib.suppress(VideoStreamError):  # the reader reports it
            await self._send(self._request())

    async def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait for responses until `ready`. Raises StallError after `stall_timeout` without any."""
        since = time.monotonic()
        while not ready():
            limit = None
            if self._config.stall_timeout is not None:
                since = max(since, self._last_response)
                limit = await self._get_wait_time(since, self._config.stall_timeout)
                if ready():
                    return
            self._changed.clear()  # nothing runs between ready() and wait(), so no change is missed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limit):
                    await self._changed.wait()

    async def _get_wait_time(self, since: float, timeout: float) -> float:
        """Seconds to wait before the next check. `since`: time of the last response. May send a heartbeat."""
        elapsed = time.monotonic() - since
        if elapsed >= timeout:
            raise StallError(
                f"{self._config.url}: no response for {timeout:g} s while one is expected; "
                "the server hangs or the network is down"
            )
        if elapsed >= timeout / 2 and self._last_probe <= since:
            self._last_probe = time.monotonic()
            await self._send_heartbeat()
        return timeout - elapsed if self._last_probe > since else timeout / 2 - elapsed

    def cancel(self) -> None:
        """End the session at once; pending calls raise SessionCancelledError. Call it in the event loop."""
        self._tracker.fail(_cancelled("cancelled by this client"))
        if self._is_open and not self._tracker.is_closed:
            self._call.cancel()
            self._changed.set()

    def _make_error(self, reason: str) -> ConnectionLostError:
        if not self._last_response:
            return ConnectionLostError(
                f"{self._config.url}: cannot be reached ({reason}); check that the server runs there and that this "
                f"is the host:port of its gRPC endpoint (8001 unless changed){proxy_hint(self._config.url)}"
            )
        return ConnectionLostError(
            f"{self._config.url}: the stream broke after {self._tracker.num_chunks} chunks ({reason})"
        )


def _cancelled(message: str) -> SessionCancelledError:
    return SessionCancelledError(RequestError.CANCELLED, message)
