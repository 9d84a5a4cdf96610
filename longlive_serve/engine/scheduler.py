# SPDX-License-Identifier: Apache-2.0
"""Who holds a slot and which session advances next, so that no viewer waits. No torch and no clock of its own.

Called by the service's worker, which tells it the time. Times are integer nanoseconds.

A session at pace `realtime` has a playback clock. It starts so that the second chunk is *due* when a whole chunk would
have played since the first (which has 9 frames: a viewer buffers 3), and every later chunk when the one before it has.
Chunks are generated at most `lead` chunks before that. The chunk that is due first goes first; a first chunk or a
prompt switch goes before it, as long as nobody's chunk comes late for that. Sessions at pace `asap` have no clock and
get the time that is left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

SECOND = 1_000_000_000
CHUNK_FRAMES = 12  # of every chunk but the first
RISE, FALL = 0.1, 0.01  # of a new measurement in the cost of a chunk: what was slow once is slow again
PROOF = 50  # chunks after which a measured cost is not doubted any more


@dataclasses.dataclass(eq=False)
class Seat:
    """A session as the scheduler sees it."""

    session_id: str
    fps: int | None
    """Frames per second of its playback clock; None: pace `asap`."""
    lead: int
    """Chunks that may be ready before they are due."""
    since: int
    """When it came, or last got something to do."""
    resumed: bool = False
    """Somebody was watching it when it broke off."""
    slot: int = -1
    ready: bool = True
    """There are chunks to generate."""
    hurried: bool = False
    """A prompt switch takes effect with the next chunk."""
    frame: int = 0
    """First frame of the next chunk."""
    started: int | None = None
    """When frame 0 is shown on the playback clock; None until the first chunk is there."""
    there_at: int | None = None
    """When the chunk that is being generated should be there; None: none is."""

    @property
    def period(self) -> int:
        """Time that a chunk plays."""
        assert self.fps is not None
        return CHUNK_FRAMES * SECOND // self.fps

    @property
    def due(self) -> int:
        """When the first chunk that is not there has to be. For the very first, a viewer is granted as long as a chunk
        plays."""
        assert self.fps is not None
        return self.since + self.period if self.started is None else self.started + self.frame * SECOND // self.fps

    @property
    def is_new(self) -> bool:
        """Its clock has no start yet, and no chunk is generated that will start it."""
        return self.started is None and self.there_at is None

    @property
    def next_due(self) -> int:
        """When the chunk has to be there that is generated next, after one that is being generated."""
        if self.there_at is None:
            return self.due
        return (self.there_at if self.started is None else self.due) + self.period

    @property
    def released(self) -> int:
        """From when on the next chunk may be generated; the first chunk of a new prompt one chunk earlier."""
        if self.is_new:
            return self.since
        return self.next_due - (self.lead + self.hurried) * self.period


class Scheduler:
    """Admits sessions to slots in the order of arrival and says whose chunk is next."""

    def __init__(self, slots: int, *, cost: int = 0, headroom: float = 0.8, doubt: float = 0.0) -> None:
        """`cost`: time of a chunk, as measured so far. `headroom`: share of all time that clocks may count on.
        `doubt`: what a cost that was measured without load may be too low by, as a share of it."""
        self._slots = slots
        self._free = list(range(slots))[::-1]
        self._queue: list[Seat] = []
        self._seats: dict[str, Seat] = {}  # those with a slot, in the order of their last turns
        self._headroom, self._doubt = headroom, doubt
        self.cost = cost
        """Time of a chunk that is seldom exceeded."""
        self.deadline_misses = 0
        self._measured = 0  # chunks

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def live(self) -> int:
        return len(self._seats)

    def capacity(self, fps: int) -> int:
        """How many sessions with such a clock are held at once, all chunks in time."""
        load = self._load(fps)
        return self._slots if not load else min(self._slots, int(self._headroom / load))

    def has_room(self, fps: int) -> bool:
        """Whether a session with such a clock that comes now is admitted at once."""
        return bool(self._free) and not self._queue and self._fits_beside(fps)

    def shortest_lead(self, now: int) -> int:
        """Time until the first chunk is due, of all that play; 0: none does."""
        return min((seat.due - now for seat in self._seats.values() if seat.started is not None), default=0)

    def add(self, session_id: str, now: int, *, fps: int | None, lead: int, resumed: bool = False) -> None:
        """Queue a session; one that is `resumed` before those that nobody has seen anything of yet."""
        seat = Seat(session_id=session_id, fps=fps, lead=lead, since=now, resumed=resumed)
        place = sum(other.resumed for other in self._queue) if resumed else len(self._queue)
        self._queue.insert(place, seat)

    def place(self, session_id: str) -> int:
        """Its place in the queue, from 1; 0 when it has a slot."""
        return next((i for i, seat in enumerate(self._queue, 1) if seat.session_id == session_id), 0)

    def admit(self, now: int) -> list[tuple[str, int]]:
        """Give free slots to those who wait longest and whose clock can be kept; returns who got which."""
        admitted = []
        for seat in list(self._queue):
            if not self._free:
                break
            if seat.fps is not None and not self._fits_beside(seat.fps):
                continue  # those at pace asap behind it take nobody's time
            self._queue.remove(seat)
            seat.slot, seat.since = self._free.pop(), now
            self._seats[seat.session_id] = seat
            admitted.append((seat.session_id, seat.slot))
        return admitted

    def ready(self, session_id: str, now: int) -> None:
        """The session has chunks to generate again. Time that it let pass is not held against the server."""
        seat = self._seat(session_id)
        if seat.ready:
            return
        seat.ready, seat.since = True, now
        if seat.started is not None:
            seat.started += max(0, now + seat.period - seat.due)

    def rest(self, session_id: str) -> None:
        """The session has nothing to generate for now."""
        self._seat(session_id).ready = False

    def hurry(self, session_id: str) -> None:
        """The session's next chunk is the first of a new prompt: somebody waits for it."""
        self._seat(session_id).hurried = True

    def next(self, now: int) -> tuple[str | None, int | None]:
        """Whose chunk to generate now; if nobody's, the time from when on to ask again (None: after any change).

        Nobody's whose chunk is being generated: it is the turn of the others.
        """
        ready = [seat for seat in self._seats.values() if seat.ready]
        clocked = sorted((seat for seat in ready if seat.fps is not None), key=lambda seat: seat.next_due)
        free = [seat for seat in clocked if seat.there_at is None]
        may = [seat for seat in free if seat.released <= now]
        eager = [seat for seat in may if seat.is_new or seat.hurried]
        begin = self._free_at(now)
        for seat in eager:
            if self._harmless(seat, clocked, begin):
                return seat.session_id, None
        if may:
            return may[0].session_id, None
        for seat in ready:
            if seat.fps is None and seat.there_at is None and self._harmless(seat, clocked, begin):
                return seat.session_id, None
        return None, min((seat.released for seat in free), default=None)

    def begin(self, session_id: str, now: int) -> None:
        """The session's next chunk is generated from now on, or after those that have been begun before."""
        seat = self._seats[session_id]
        seat.there_at = self._free_at(now) + self.cost
        seat.hurried = False

    def done(self, session_id: str, now: int, frames: int, took: int) -> int:
        """The session's chunk of `frames` is there and `took` this long. Returns by how much it came too late."""
        smoothing = RISE if took > self.cost else FALL
        self.cost = round(self.cost + smoothing * (took - self.cost)) if self.cost else took
        self._measured += 1
        seat = self._seats.pop(session_id)
        self._seats[session_id] = seat
        seat.there_at = None
        late = 0
        if seat.fps is not None:
            if seat.started is None:
                seat.started = now + (CHUNK_FRAMES - frames - seat.frame) * SECOND // seat.fps
            late = max(0, now - seat.due)
            seat.started += late  # playback stood still for so long
            self.deadline_misses += late > 0
        seat.frame += frames
        return late

    def work_ahead(self, chunks: int) -> None:
        """From now on so many chunks more may be ready before they are due."""
        for seat in self._seats.values():
            seat.lead += chunks

    def is_behind(self, now: int) -> bool:
        """Whether a chunk that plays later may be generated now."""
        playing = (seat for seat in self._seats.values() if seat.ready and seat.started is not None)
        return any(seat.fps is not None and seat.released <= now for seat in playing)

    def remove(self, session_id: str) -> None:
        """Forget a session, wherever it stands, and free its slot."""
        seat = self._seats.pop(session_id, None)
        if seat is not None:
            self._free.append(seat.slot)
        self._queue = [other for other in self._queue if other.session_id != session_id]

    def _seat(self, session_id: str) -> Seat:
        seat = self._seats.get(session_id)
        return seat or next(seat for seat in self._queue if seat.session_id == session_id)

    def _load(self, fps: int) -> float:
        """Share of all time that a session with such a clock takes."""
        doubt = self._doubt * max(0.0, 1 - self._measured / PROOF)
        return (1 + doubt) * self.cost * fps / (CHUNK_FRAMES * SECOND)

    def _fits_beside(self, fps: int) -> bool:
        clocks = [seat.fps for seat in self._seats.values() if seat.fps is not None]
        return not clocks or self._load(fps) + sum(map(self._load, clocks)) <= self._headroom

    def _free_at(self, now: int) -> int:
        """When all that has been begun should be there."""
        return max([now, *(seat.there_at for seat in self._seats.values() if seat.there_at is not None)])

    def _harmless(self, first: Seat, clocked: Iterable[Seat], begin: int) -> bool:
        """Whether every chunk that has a time is in time if `first` begins at `begin` and the others follow by due."""
        end = begin + self.cost
        for seat in clocked:
            if seat is first or seat.is_new:
                continue
            end = max(end, seat.released) + self.cost
            if end > seat.next_due:
                return False
        return True
