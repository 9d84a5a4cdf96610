# SPDX-License-Identifier: Apache-2.0
"""Slots, turns and deadlines, on a clock that the tests move."""

from __future__ import annotations

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from longlive_serve.engine.scheduler import SECOND, Scheduler

FPS, CHUNK_FRAMES = 16, 12
PERIOD = CHUNK_FRAMES * SECOND // FPS


def scheduler_of(slots: int, *names: str, cost: int = 0, fps: int | None = FPS) -> Scheduler:
    scheduler = Scheduler(slots, chunk_frames=CHUNK_FRAMES, cost=cost)
    for name in names:
        scheduler.add(name, 0, fps=fps, max_chunks_ahead=1)
    return scheduler


def test_slots_are_given_in_the_order_of_arrival() -> None:
    scheduler = scheduler_of(2, *"abcd")
    assert [name for name, _ in scheduler.admit(0)] == ["a", "b"]
    assert (scheduler.live, scheduler.waiting) == (2, 2)
    assert [scheduler.queue_position(name) for name in "abcd"] == [0, 0, 1, 2]
    scheduler.remove("a")
    assert [name for name, _ in scheduler.admit(0)] == ["c"]


def test_one_that_leaves_the_queue_is_never_admitted() -> None:
    scheduler = scheduler_of(1, *"abc")
    scheduler.admit(0)
    scheduler.remove("b")
    scheduler.remove("a")
    assert scheduler.admit(0) == [("c", 0)]


def test_a_session_whose_clock_could_not_be_kept_waits_though_a_slot_is_free() -> None:
    scheduler = scheduler_of(9, *"abcde", cost=PERIOD // 4)
    assert scheduler.capacity(FPS) == 3
    assert [name for name, _ in scheduler.admit(0)] == ["a", "b", "c"]
    scheduler.add("offline", 0, fps=None, max_chunks_ahead=1)
    assert [name for name, _ in scheduler.admit(0)] == ["offline"]
    scheduler.remove("b")
    assert [name for name, _ in scheduler.admit(0)] == ["d"]


def test_a_session_that_is_too_much_for_this_machine_still_runs_alone() -> None:
    scheduler = scheduler_of(2, *"ab", cost=2 * PERIOD)
    assert [name for name, _ in scheduler.admit(0)] == ["a"]
    assert scheduler.next(0) == ("a", None)


def test_sessions_without_a_clock_take_turns() -> None:
    scheduler = scheduler_of(3, *"abc", fps=None)
    scheduler.admit(0)
    scheduler.set_idle("b")
    turns = []
    for _ in range(4):
        name, _ = scheduler.next(0)
        assert name is not None
        turns.append(name)
        scheduler.begin(name, 0)
        scheduler.done(name, 0, 12, duration=1)
    assert turns == ["a", "c", "a", "c"]
    scheduler.ready("b", 0)
    assert scheduler.next(0)[0] == "b"


def test_no_more_than_the_lead_is_generated_ahead() -> None:
    scheduler = scheduler_of(1, "a")
    scheduler.admit(0)
    scheduler.done("a", SECOND, 9, duration=1)  # frame 9 is due 9 / 16 s later
    due = SECOND + PERIOD
    assert scheduler.next(SECOND) == ("a", None)
    scheduler.done("a", SECOND, 12, duration=1)
    assert scheduler.next(SECOND) == (None, due)  # the chunk after is due a period later
    scheduler.prioritize("a")
    assert scheduler.next(SECOND) == ("a", None)  # a new prompt is waited for
    scheduler.begin("a", SECOND)
    scheduler.done("a", SECOND, 12, duration=1)
    assert scheduler.next(SECOND) == (None, due + PERIOD)


def test_while_a_chunk_is_generated_the_next_one_is_anothers() -> None:
    scheduler = scheduler_of(2, *"ab")
    scheduler.admit(0)
    assert scheduler.next(0) == ("a", None)
    scheduler.begin("a", 0)
    assert scheduler.next(0) == ("b", None)
    scheduler.begin("b", 0)
    assert scheduler.next(0) == (None, None)
    scheduler.done("a", SECOND, 9, duration=1)
    assert scheduler.next(SECOND) == ("a", None)


def test_a_prompt_that_comes_while_a_chunk_is_generated_is_waited_for_with_the_next() -> None:
    scheduler = scheduler_of(1, "a")
    scheduler.admit(0)
    scheduler.done("a", 0, 9, duration=1)
    scheduler.begin("a", 0)
    scheduler.prioritize("a")
    scheduler.done("a", 0, 12, duration=1)
    assert scheduler.next(0) == ("a", None)


def test_a_first_chunk_waits_where_it_would_make_others_late_after_what_has_been_begun() -> None:
    scheduler = scheduler_of(3, "a", cost=PERIOD // 4)
    scheduler.add("offline", 0, fps=None, max_chunks_ahead=1)
    scheduler.admit(0)
    scheduler.done("a", 0, 9, duration=PERIOD // 4)  # the next one is due a period later
    scheduler.add("new", PERIOD // 2, fps=FPS, max_chunks_ahead=1)
    scheduler.admit(PERIOD // 2)
    assert scheduler.next(PERIOD // 2) == ("new", None)
    scheduler.begin("offline", PERIOD // 2)
    assert scheduler.next(PERIOD // 2) == ("a", None)


def test_who_was_interrupted_waits_before_who_has_not_begun() -> None:
    scheduler = Scheduler(1, chunk_frames=CHUNK_FRAMES)
    for name in ("new", "resumed 1", "newer", "resumed 2"):
        scheduler.add(name, 0, fps=None, max_chunks_ahead=1, resumed=name.startswith("resumed"))
    places = {name: scheduler.queue_position(name) for name in ("resumed 1", "resumed 2", "new", "newer")}
    assert list(places.values()) == [1, 2, 3, 4]


def test_a_cost_that_no_load_has_proved_is_doubted() -> None:
    scheduler = Scheduler(8, chunk_frames=CHUNK_FRAMES, cost=PERIOD // 10, cost_margin=0.5)
    assert scheduler.capacity(FPS) == 5  # of 8 that 0.8 of all time would hold
    scheduler.add("a", 0, fps=FPS, max_chunks_ahead=1)
    scheduler.admit(0)
    for number in range(50):
        scheduler.done("a", number * PERIOD, 12, duration=PERIOD // 10)
    assert scheduler.capacity(FPS) == 8


def test_a_cost_rises_fast_and_falls_slowly() -> None:
    scheduler = scheduler_of(1, "a")
    scheduler.admit(0)
    costs = []
    for took in [10**5] + 10 * [2 * 10**5] + 10 * [10**5]:
        scheduler.done("a", 0, 12, duration=took)
        costs.append(scheduler.cost)
    assert costs[0] == 10**5
    assert costs[10] > 1.6 * 10**5
    assert costs[20] > 0.9 * costs[10]


def test_a_late_chunk_is_counted_once_and_playback_goes_on_from_it() -> None:
    scheduler = scheduler_of(1, "a")
    scheduler.admit(0)
    assert scheduler.done("a", SECOND, 9, duration=1) == 0
    late = scheduler.done("a", 3 * SECOND, 12, duration=1)
    assert late == 2 * SECOND - PERIOD
    assert scheduler.done("a", 3 * SECOND + PERIOD, 12, duration=1) == 0
    assert scheduler.deadline_misses == 1


def test_time_that_a_client_lets_pass_is_no_miss() -> None:
    scheduler = scheduler_of(1, "a")
    scheduler.admit(0)
    scheduler.done("a", 0, 9, duration=1)
    scheduler.set_idle("a")
    assert scheduler.next(100 * SECOND) == (None, None)
    scheduler.ready("a", 100 * SECOND)
    assert scheduler.next(100 * SECOND) == ("a", None)
    assert scheduler.done("a", 100 * SECOND + PERIOD, 12, duration=1) == 0


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from(["add", "offline", "remove", "admit"]), st.integers(0, 9))),
    st.integers(0, PERIOD),
)
def test_a_slot_has_one_owner_and_none_is_lost(slots: int, events: list[tuple[str, int]], cost: int) -> None:
    scheduler = Scheduler(slots, chunk_frames=CHUNK_FRAMES, cost=cost)
    waiting: list[str] = []
    owners: dict[str, int] = {}
    for kind, number in events:
        name = str(number)
        if kind in ("add", "offline") and name not in waiting and name not in owners:
            scheduler.add(name, 0, fps=FPS if kind == "add" else None, max_chunks_ahead=1)
            waiting.append(name)
        elif kind == "remove":
            scheduler.remove(name)
            owners.pop(name, None)
            waiting = [other for other in waiting if other != name]
        elif kind == "admit":
            for admitted, slot in scheduler.admit(0):
                waiting.remove(admitted)
                owners[admitted] = slot
        assert len(set(owners.values())) == len(owners) <= slots
        assert set(owners.values()) <= set(range(slots))
        assert (scheduler.live, scheduler.waiting) == (len(owners), len(waiting))
        assert [scheduler.queue_position(name) for name in waiting] == list(range(1, len(waiting) + 1))


@dataclasses.dataclass
class Viewer:
    """One who comes at `comes` (share of a period) and switches the prompt every `switches` chunks."""

    comes: float
    switches: int
    max_chunks_ahead: int
    chunks: int = 0
    first: int | None = None


viewers = st.builds(Viewer, comes=st.floats(0, 5), switches=st.integers(2, 9), max_chunks_ahead=st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(viewers, min_size=1, max_size=8), st.floats(0.02, 0.79), st.booleans(), st.sampled_from([0, 0.1, 0.5]))
def test_no_deadline_is_missed_while_the_load_fits_and_nobody_starves(
    crowd: list[Viewer], load: float, offline: bool, decode: float
) -> None:
    """`load`: of all admitted viewers together. `decode`: share of a chunk before whose end the next one is chosen.
    Times go on for 40 periods."""
    cost = int(load * PERIOD / len(crowd))
    scheduler = Scheduler(len(crowd) + 1, chunk_frames=CHUNK_FRAMES, cost=cost)
    now, made_offline = 0, 0
    if offline:
        scheduler.add("offline", 0, fps=None, max_chunks_ahead=1)
    here: dict[str, Viewer] = {}
    in_flight: tuple[str, int] | None = None

    def finish(name: str, end: int) -> None:
        nonlocal now, made_offline
        now = max(now, end)
        scheduler.done(name, now, 12 if name in here and here[name].chunks else 9, duration=cost)
        if name == "offline":
            made_offline += 1
            return
        viewer = here[name]
        viewer.chunks += 1
        viewer.first = viewer.first or now
        if viewer.chunks % viewer.switches == 0:
            scheduler.prioritize(name)

    while now < 40 * PERIOD:
        for number, viewer in enumerate(crowd):
            if str(number) not in here and viewer.comes * PERIOD <= now:
                here[str(number)] = viewer
                scheduler.add(str(number), now, fps=FPS, max_chunks_ahead=viewer.max_chunks_ahead)
        scheduler.admit(now)
        assert scheduler.waiting == 0, "the load fits"
        name, wake = scheduler.next(now)
        idle, launched = name is None and in_flight is None, None
        if name is not None:
            scheduler.begin(name, now)
            launched = name, max(now, in_flight[1] if in_flight else now) + cost
        if in_flight is not None:
            finish(*in_flight)
        in_flight = launched
        if in_flight is not None and not decode:
            finish(*in_flight)
            in_flight = None
        elif in_flight is not None:
            now = max(now, in_flight[1] - int(decode * cost))
        elif idle:
            coming = [int(v.comes * PERIOD) + 1 for n, v in enumerate(crowd) if str(n) not in here]
            now = max(now + 1, min([t for t in (wake, *coming) if t is not None], default=now + PERIOD))
    assert scheduler.deadline_misses == 0
    for viewer in crowd:
        assert viewer.first is not None
        assert viewer.first - viewer.comes * PERIOD <= 2 * PERIOD
        played = (now - viewer.first) / PERIOD
        assert played - 1 <= viewer.chunks <= played + viewer.max_chunks_ahead + 3
    if offline:
        assert made_offline > 0
