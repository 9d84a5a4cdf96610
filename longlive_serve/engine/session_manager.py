# SPDX-License-Identifier: Apache-2.0
"""Starts, updates, queues and ends the sessions of an engine core.

Used only in the engine core's worker thread. It generates nothing.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from longlive_serve.config.presets import FPS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.client_stream import (
    ChunkRequest,
    ClientStream,
    EncodingResponseSender,
    ResponseSender,
    notice_chunk,
)
from longlive_serve.engine.frame_encoder import make_encode
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.scheduler import SECOND, Scheduler
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.engine.snapshot import dump, load_session
from longlive_serve.models.dit.kv_cache import KVCache
from longlive_serve.observability.metrics import Metrics, MetricUpdate
from longlive_serve.observability.tracing import Trace
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import READY, FrameChunk, Request
from longlive_serve.protocol.session_options import ASAP, HEALTH, RECACHE

log = logging.getLogger(__name__)

# Ends that do not count as failures.
NO_FAILURE = (RequestError.CANCELLED, RequestError.SHUTTING_DOWN, RequestError.UNAVAILABLE)
DRAIN_CHUNKS, DRAIN_S = 2, 5.0  # extra chunks per viewer before a shutdown, and the time limit for them
COST_MARGIN = 0.5  # a chunk takes longer than in the warm-up: clients, Triton and other sessions compete


class SessionManager:
    """Client streams by session id, and their scheduler."""

    def __init__(self, runner: ModelRunner, config: ServeConfig, chunk_s: float) -> None:
        self.scheduler = Scheduler(
            config.slots,
            chunk_frames=config.model_config.window.chunk_frames,
            cost=round(chunk_s * SECOND),
            max_utilization=config.max_utilization,
            cost_margin=COST_MARGIN,
        )
        self.metrics = Metrics()
        self.metrics.set("slots", config.slots)
        backends = runner.backends
        self.metrics.set("kv_cache_bytes", KVCache.bytes_of(runner.config, config.slots, backends.dit.cache_dtype))
        info = {"preset": config.preset, "variant": config.variant, "decoder": config.decoder, "backend": backends.name}
        self.metrics.set("info", 1, **info, device=backends.device, dtype=backends.dtype)
        self._runner = runner
        self._model_config = runner.config
        self._config = config
        self._streams: dict[str, ClientStream] = {}
        self._drain_deadline: float | None = None
        """When a drain ends the last sessions (monotonic seconds); None: it has not begun."""

    def __getitem__(self, session_id: str) -> ClientStream:
        return self._streams[session_id]

    def __contains__(self, stream: ClientStream) -> bool:
        return self._streams.get(stream.session.id) is stream

    def __len__(self) -> int:
        return len(self._streams)

    def handle(self, request: Request, sender: EncodingResponseSender, draining: bool) -> None:
        """Process a request. Raises RequestError to refuse it; its session, if any, continues."""
        if draining and request.start:
            raise shutting_down()
        if request.options.command == HEALTH:
            self._send_health(sender)
            return
        stream = self._streams.get(request.session_id)
        if request.start:
            if stream is not None:
                text = f"session {request.session_id} is live; START with a new id"
                raise RequestError(RequestError.SESSION_EXISTS, text)
            self._start(request, sender)
        elif stream is None:
            text = "is not live here: it has ended, failed or never started; send a START"
            raise RequestError(RequestError.UNKNOWN_SESSION, f"session {request.session_id} {text}")
        else:
            self._update(stream, request, sender)

    def admit(self) -> None:
        for session_id, slot in self.scheduler.admit(time.monotonic_ns()):
            session = self._streams[session_id].session
            session.slot = slot
            self.metrics.add("resumed_sessions", int(session.next_chunk > 0))  # a snapshot has at least one chunk

    def end_inactive(self) -> None:
        """End sessions whose client has disconnected or does not read, and sessions that are idle for too long."""
        now = time.monotonic()
        for stream in list(self._streams.values()):
            silent = now - stream.last_activity > self._config.idle_timeout_s
            if stream.is_cancelled:
                self.end(stream, RequestError(RequestError.CANCELLED, "the client cancelled the request"))
            elif not stream.chunk_requests and silent:
                log.info("idle for %g s", self._config.idle_timeout_s, extra=stream.log_extra)
                self.end(stream)
            elif stream.unacked >= self._config.max_unacked and silent:
                text = f"{stream.unacked} chunks were sent since its last request, expected another (it may be empty)"
                self.end(stream, RequestError(RequestError.CANCELLED, f"the client does not read: {text}"))

    def notify_waiting(self) -> None:
        """Refuse sessions that have waited too long or exceed the queue; notify the others of their position."""
        now, max_waiting = time.monotonic(), self._config.max_waiting
        for stream in list(self._streams.values()):  # first: refused sessions leave the queue
            if now - stream.arrival_time >= stream.max_wait_s and self.scheduler.queue_position(stream.session.id):
                waited = stream.max_wait_s
                self._refuse(stream, f"no slot became free in {waited:g} s" if waited else "no slot is free")
        for stream in list(self._streams.values()):
            queue_position = self.scheduler.queue_position(stream.session.id)
            if queue_position > max_waiting:
                self._refuse(stream, f"{max_waiting} sessions are waiting for a slot already")
            else:
                stream.notify_queue_position(queue_position, self.scheduler.waiting, self._model_config.video_size)

    def on_chunk_sent(self, stream: ClientStream, chunk: FrameChunk) -> None:
        """Count a sent chunk (or a part of it); end or pause the session if no more may be sent."""
        now = time.monotonic()
        self.metrics.add("frames", len(chunk.frames))
        if stream.needs_first_frame:
            stream.needs_first_frame = False
            self.metrics.observe("first_frame_seconds", now - stream.arrival_time)
        for index in [index for index in stream.switch_times if index <= chunk.prompt_index]:
            self.metrics.observe("switch_seconds", now - stream.switch_times.pop(index))
        if not chunk.completes:
            return
        self.metrics.add("chunks")
        self.metrics.observe("chunk_seconds", chunk.seconds)
        for phase in self._runner.phases:
            self.metrics.add("phase_seconds", phase.seconds, phase=phase.name)
        stream.trace_chunk(chunk, self._runner.phases)
        if not stream.chunk_requests and stream.end_requested:
            self.end(stream)
        elif not stream.chunk_requests or stream.unacked >= self._config.max_unacked:
            self.scheduler.set_idle(stream.session.id)

    def end(self, stream: ClientStream, error: RequestError | None = None) -> None:
        """Free the session's slot and close its open requests, with `error` if there is one."""
        del self._streams[stream.session.id]
        self.scheduler.remove(stream.session.id)
        for chunk_request in stream.chunk_requests:
            if error is None:
                chunk_request.sender.send(None, final=True)
            else:
                chunk_request.sender.fail(error)
        if error is not None and error.kind not in NO_FAILURE:
            self.metrics.add("failed_sessions")
        log.info("ended after %d chunks (%s)", stream.session.next_chunk, error or "complete", extra=stream.log_extra)
        if stream.trace is not None:
            log.info("trace in %s", stream.trace.write(Path(self._config.trace_dir)), extra=stream.log_extra)

    def end_all(self, error: RequestError) -> None:
        for stream in list(self._streams.values()):
            self.end(stream, error)

    def drain(self, at_once: bool) -> None:
        """End every session for a shutdown. Sessions with snapshots get a last one to continue from.

        The first call ends the waiting sessions and extends the prefetch, so that viewers have frames to play while
        they reconnect. A later call ends the rest; with `at_once`, the first call does.
        """
        now = time.monotonic()
        if self._drain_deadline is None:
            self._drain_deadline = now + DRAIN_S
            self.scheduler.extend_prefetch(DRAIN_CHUNKS)
            for stream in list(self._streams.values()):
                if self.scheduler.queue_position(stream.session.id):
                    self.end(stream, shutting_down())
        if not at_once and now < self._drain_deadline and self.scheduler.can_prefetch(time.monotonic_ns()):
            return
        for stream in list(self._streams.values()):
            session = stream.session
            if stream.snapshot_every and session.context_latents and stream.chunk_requests:
                last = self._notice(session, "the server is shutting down", snapshot=dump(session, self._model_config))
                stream.chunk_requests[0].sender.send(last, final=False)
            self.end(stream, shutting_down())

    def collect_metrics(self) -> Sequence[MetricUpdate]:
        """The metrics that have changed since the last call."""
        metrics, scheduler = self.metrics, self.scheduler
        metrics.set("live_sessions", scheduler.live)
        metrics.set("waiting_sessions", scheduler.waiting)
        metrics.set("deadline_misses", scheduler.deadline_misses)
        metrics.set("capacity_sessions", scheduler.capacity(FPS))
        metrics.set("playback_lead_seconds", scheduler.min_slack(time.monotonic_ns()) / SECOND)
        return metrics.collect_updates()

    def _send_health(self, sender: ResponseSender) -> None:
        scheduler = self.scheduler
        full = f"full: {scheduler.live} sessions are live, {scheduler.waiting} wait"
        notice = READY if scheduler.has_capacity(FPS) else full
        sender.send(notice_chunk(self._runner.config.video_size, notice), final=True)

    def _start(self, request: Request, sender: EncodingResponseSender) -> None:
        options = request.options
        if self._config.require_session_token and options.session_token is None:
            text = "OPTIONS.session_token: got none, expected a secret that later requests of the session repeat"
            raise RequestError(RequestError.FORBIDDEN, text)
        self._check_client(request.client)
        session = self._from_snapshot(request) if request.snapshot is not None else _new_session(request)
        session.dit = self._runner.backends.dit
        session.client, session.token = request.client, options.session_token or ""
        chunk_requests = deque([ChunkRequest(sender, request.chunks or None)])
        max_wait_s = self._config.max_wait_s
        if options.max_wait_s is not None:
            max_wait_s = min(options.max_wait_s, max_wait_s)
        stream = ClientStream(session, chunk_requests, request.end, time.monotonic(), max_wait_s)
        stream.snapshot_every = options.snapshot_every or 0
        stream.stream_partial_chunks = bool(options.stream_partial_chunks)
        stream.encode = make_encode(options.format, self._model_config.video_size, options.fps or FPS)
        stream.trace = Trace(session.id) if self._config.trace_dir else None
        self._streams[session.id] = stream
        fps = None if options.pace == ASAP else options.fps or FPS
        resumed = request.snapshot is not None
        now, ahead = time.monotonic_ns(), self._config.max_chunks_ahead
        self.scheduler.add(session.id, now, fps=fps, max_chunks_ahead=ahead, resumed=resumed)
        pace = "asap" if fps is None else f"{fps} fps"
        log.info("started at chunk %d, chunks %s, %s", session.next_chunk, request.chunks, pace, extra=stream.log_extra)

    def _check_client(self, client: str) -> None:
        limit = self._config.max_sessions_per_client
        own = sum(stream.session.client == client for stream in self._streams.values())
        if client and limit and own >= limit:
            self.metrics.add("refused_sessions")
            text = f"client {client!r} has {own} sessions, expected at most {limit}; end one first"
            raise RequestError(RequestError.RATE_LIMITED, text)

    def _from_snapshot(self, request: Request) -> Session:
        assert request.snapshot is not None
        backends, token = self._runner.backends, request.options.session_token or ""
        device, dtype = backends.device, self._runner.dtype
        return load_session(request.snapshot, request.session_id, token, self._model_config, device, dtype)

    def _refuse(self, stream: ClientStream, reason: str) -> None:
        """End a waiting session. With a shorter `max_wait_s` it counts as redirected: its client asks other servers."""
        if stream.max_wait_s < self._config.max_wait_s:
            self.metrics.add("redirected_sessions")
            hint = "START with a new session id, for another server, or without OPTIONS.max_wait_s, to wait here"
        else:
            self.metrics.add("refused_sessions")
            hint = f"try again in {self._config.max_wait_s:g} s"
        self.end(stream, RequestError(RequestError.UNAVAILABLE, f"{reason}; {hint}"))

    def _update(self, stream: ClientStream, request: Request, sender: EncodingResponseSender) -> None:
        session = stream.session
        stream.check(request, self._config.max_requests_per_s)
        stream.record_request()
        index = session.prompt.index
        if request.prompt is not None:
            frame = request.options.at_latent_frame
            index = session.add_prompt(request.prompt, NOW if frame is None else frame).index
            if frame is None:
                self.scheduler.prioritize(session.id)
                stream.switch_times[index] = time.monotonic()
        if request.chunks is not None:
            stream.chunk_requests.append(ChunkRequest(sender, request.chunks or None))
        else:
            sender.send(self._notice(session, prompt_index=index), final=True)
        if stream.chunk_requests:
            self.scheduler.ready(session.id, time.monotonic_ns())
        if request.end:
            stream.end_requested = True
            if request.chunks is None:
                self.end(stream)

    def _notice(self, session: Session, text: str = "", **fields: object) -> FrameChunk:
        """A response without frames, with the next frame number and the prompt in force."""
        state = {"first_frame": self._runner.first_frame(session.next_chunk), "prompt_index": session.prompt.index}
        return notice_chunk(self._model_config.video_size, text, **(state | fields))


def shutting_down() -> RequestError:
    return RequestError(RequestError.SHUTTING_DOWN, "the server is shutting down; connect again later")


def _new_session(request: Request) -> Session:
    assert request.prompt is not None
    return Session(
        id=request.session_id,
        prompt=Prompt(index=0, text=request.prompt),
        noise=SeededNoise(request.seed or 0),
        global_sink=request.options.global_sink is not False,
        on_switch=request.options.on_switch or RECACHE,
    )
