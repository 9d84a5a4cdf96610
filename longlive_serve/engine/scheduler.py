# SPDX-License-Identifier: Apache-2.0
"""Assigns slots and selects the next chunk: EDF with a schedulability test. No torch and no clock of its own.

Called by the engine core's worker, which passes the current time. Times are integer nanoseconds.

A session at pace `realtime` has a playback clock. Its second chunk is *due* one chunk period (12 frames) after the
first is complete; the first has only 9 frames, so a viewer buffers 3. Each later chunk is due one period after the one
before it. A chunk starts at most `max_chunks_ahead` periods before it is due. The order is EDF (earliest deadline
first). A first chunk or a prompt switch goes first if a schedulability test shows that no other chunk misses its
deadline. Sessions at pace `asap` have no clock and get the remaining time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

SECOND = 1_000_000_000
ALPHA_UP, ALPHA_DOWN = 0.1, 0.01  # EMA weights of slower and of faster chunks: the cost is estimated high
MIN_MEASUREMENTS = 50  # chunks over which the cost margin decays to 0


@dataclasses.dataclass(eq=False)
class ScheduledSession:
    """A session as the scheduler sees it."""

    session_id: str
    fps: int | None
    """Frames per second of its playback clock; None: pace `asap`."""
    chunk_frames: int
    """Video frames of every chunk except the first."""
    max_chunks_ahead: int
    """Chunks that may be ready before they are due."""
    since: int
    """When it was queued, got its slot, or last became ready."""
    resumed: bool = False
    """It continues an interrupted session, so it goes before new ones in the queue."""
    slot: int = -1
    ready: bool = True
    """There are chunks to generate."""
    prioritized: bool = False
    """A prompt switch takes effect with the next chunk."""
    frame: int = 0
    """First frame of the next chunk."""
    started: int | None = None
    """Time of frame 0 on the playback clock; None until the first chunk is complete."""
    expected_at: int | None = None
    """When the chunk in flight should be complete; None: none is in flight."""

    @property
    def period(self) -> int:
        """Playback time of a chunk."""
        assert self.fps is not None
        return self.chunk_frames * SECOND // self.fps

    @property
    def deadline(self) -> int:
        """When the first incomplete chunk is due; for the very first, one period after `since`."""
        assert self.fps is not None
        return self.since + self.period if self.started is None else self.started + self.frame * SECOND // self.fps

    @property
    def is_new(self) -> bool:
        """Its clock has not started, and no chunk in flight will start it."""
        return self.started is None and self.expected_at is None

    @property
    def next_deadline(self) -> int:
        """Deadline of the next chunk to start, which follows the chunk in flight if there is one."""
        if self.expected_at is None:
            return self.deadline
        return (self.expected_at if self.started is None else self.deadline) + self.period

    @property
    def earliest_start(self) -> int:
        """When the next chunk may start; the first chunk of a new prompt may start one period earlier."""
        if self.is_new:
            return self.since
        return self.next_deadline - (self.max_chunks_ahead + self.prioritized) * self.period


class Scheduler:
    """Admits sessions to slots in order of arrival and selects the session of the next chunk."""

    def __init__(
        self, slots: int, *, chunk_frames: int, cost: int = 0, max_utilization: float = 0.8, cost_margin: float = 0.0
    ) -> None:
        """`chunk_frames`: video frames of every chunk except the first. `cost`: measured time per chunk; 0: unknown.
        `max_utilization`: share of the time that playback clocks may use. `cost_margin`: share of `cost` that is added
        to it for admission until chunks were measured under load."""
        self._slots, self._chunk_frames = slots, chunk_frames
        self._free = list(range(slots))[::-1]
        self._waiting: list[ScheduledSession] = []
        self._running: dict[str, ScheduledSession] = {}  # sessions with a slot, by the time of their last chunk
        self._max_utilization, self._cost_margin = max_utilization, cost_margin
        self.cost = cost
        """Estimated time per chunk, rather too high than too low."""
        self.deadline_misses = 0
        self._num_done = 0  # chunks

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def live(self) -> int:
        return len(self._running)

    def capacity(self, fps: int) -> int:
        """How many sessions at `fps` can run at once with every chunk on time."""
        load = self._load(fps)
        return self._slots if not load else min(self._slots, int(self._max_utilization / load))

    def has_capacity(self, fps: int) -> bool:
        """Whether a new session at `fps` would be admitted at once."""
        return bool(self._free) and not self._waiting and self._has_capacity(fps)

    def min_slack(self, now: int) -> int:
        """Shortest time to a deadline among the sessions that play; 0: none plays."""
        return min(
            (session.deadline - now for session in self._running.values() if session.started is not None), default=0
        )

    def add(self, session_id: str, now: int, *, fps: int | None, max_chunks_ahead: int, resumed: bool = False) -> None:
        """Queue a session. A `resumed` one goes before new ones: its viewer is already watching."""
        session = ScheduledSession(
            session_id=session_id,
            fps=fps,
            chunk_frames=self._chunk_frames,
            max_chunks_ahead=max_chunks_ahead,
            since=now,
            resumed=resumed,
        )
        queue_position = sum(other.resumed for other in self._waiting) if resumed else len(self._waiting)
        self._waiting.insert(queue_position, session)

    def queue_position(self, session_id: str) -> int:
        """Position in the queue, from 1; 0: it has a slot."""
        return next((i for i, session in enumerate(self._waiting, 1) if session.session_id == session_id), 0)

    def admit(self, now: int) -> list[tuple[str, int]]:
        """Assign free slots in order of arrival, if playback clocks can be met; returns session ids and slots."""
        admitted = []
        for session in list(self._waiting):
            if not self._free:
                break
            if session.fps is not None and not self._has_capacity(session.fps):
                continue  # sessions at pace asap behind it need no capacity
            self._waiting.remove(session)
            session.slot, session.since = self._free.pop(), now
            self._running[session.session_id] = session
            admitted.append((session.session_id, session.slot))
        return admitted

    def ready(self, session_id: str, now: int) -> None:
        """The session has chunks to generate again. Its idle time does not count as lateness."""
        session = self._session(session_id)
        if session.ready:
            return
        session.ready, session.since = True, now
        if session.started is not None:
            session.started += max(0, now + session.period - session.deadline)

    def set_idle(self, session_id: str) -> None:
        """The session has no chunks to generate until `ready`."""
        self._session(session_id).ready = False

    def prioritize(self, session_id: str) -> None:
        """The session's next chunk is the first of a new prompt: generate it early."""
        self._session(session_id).prioritized = True

    def next(self, now: int) -> tuple[str | None, int | None]:
        """The session whose chunk to generate now, or None and the time to ask again (None: after any change).

        Sessions with a chunk in flight are not selected.
        """
        ready = [session for session in self._running.values() if session.ready]
        by_deadline = sorted(
            (session for session in ready if session.fps is not None), key=lambda session: session.next_deadline
        )
        idle = [session for session in by_deadline if session.expected_at is None]
        candidates = [session for session in idle if session.earliest_start <= now]
        eager = [session for session in candidates if session.is_new or session.prioritized]
        begin = self._get_free_time(now)
        for session in eager:
            if self._is_schedulable(session, by_deadline, begin):
                return session.session_id, None
        if candidates:
            return candidates[0].session_id, None
        background = [session for session in ready if session.fps is None and session.expected_at is None]
        for session in background:
            if self._is_schedulable(session, by_deadline, begin):
                return session.session_id, None
        return None, min((session.earliest_start for session in idle), default=None)

    def begin(self, session_id: str, now: int) -> None:
        """The session's next chunk is launched; it runs after the chunks in flight."""
        session = self._running[session_id]
        session.expected_at = self._get_free_time(now) + self.cost
        session.prioritized = False

    def done(self, session_id: str, now: int, frames: int, duration: int) -> int:
        """The session's chunk of `frames` frames took `duration`. Returns by how much it missed its deadline."""
        alpha = ALPHA_UP if duration > self.cost else ALPHA_DOWN
        self.cost = round(self.cost + alpha * (duration - self.cost)) if self.cost else duration
        self._num_done += 1
        session = self._running.pop(session_id)
        self._running[session_id] = session
        session.expected_at = None
        delay = 0
        if session.fps is not None:
            if session.started is None:
                session.started = now + (self._chunk_frames - frames - session.frame) * SECOND // session.fps
            delay = max(0, now - session.deadline)
            session.started += delay  # playback paused for this long
            self.deadline_misses += delay > 0
        session.frame += frames
        return delay

    def extend_prefetch(self, chunks: int) -> None:
        """Let every running session have this many more chunks ready before they are due."""
        for session in self._running.values():
            session.max_chunks_ahead += chunks

    def can_prefetch(self, now: int) -> bool:
        """Whether a chunk may be generated ahead now."""
        sessions = (session for session in self._running.values() if session.ready and session.started is not None)
        return any(session.fps is not None and session.earliest_start <= now for session in sessions)

    def remove(self, session_id: str) -> None:
        """Remove a session from the queue or from its slot."""
        session = self._running.pop(session_id, None)
        if session is not None:
            self._free.append(session.slot)
        self._waiting = [other for other in self._waiting if other.session_id != session_id]

    def _session(self, session_id: str) -> ScheduledSession:
        session = self._running.get(session_id)
        return session or next(session for session in self._waiting if session.session_id == session_id)

    def _load(self, fps: int) -> float:
        """Share of the time that a session at `fps` takes."""
        cost_margin = self._cost_margin * max(0.0, 1 - self._num_done / MIN_MEASUREMENTS)
        return (1 + cost_margin) * self.cost * fps / (self._chunk_frames * SECOND)

    def _has_capacity(self, fps: int) -> bool:
        rates = [session.fps for session in self._running.values() if session.fps is not None]
        return not rates or self._load(fps) + sum(map(self._load, rates)) <= self._max_utilization

    def _get_free_time(self, now: int) -> int:
        """When all chunks in flight should be complete."""
        return max(
            [now, *(session.expected_at for session in self._running.values() if session.expected_at is not None)]
        )

    def _is_schedulable(self, first: ScheduledSession, by_deadline: Iterable[ScheduledSession], begin: int) -> bool:
        """Whether every chunk meets its deadline if `first` begins at `begin` and the others follow in EDF order."""
        end = begin + self.cost
        for session in by_deadline:
            if session is first or session.is_new:
                continue
            end = max(end, session.earliest_start) + self.cost
            if end > session.next_deadline:
                return False
        return True
