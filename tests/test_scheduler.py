# SPDX-License-Identifier: Apache-2.0
"""Slots and turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from longlive_serve.scheduler import Scheduler


def test_slots_are_given_in_the_order_of_arrival() -> None:
    scheduler = Scheduler(2)
    for name in "abcd":
        scheduler.add(name)
    assert [name for name, _ in scheduler.admit()] == ["a", "b"]
    assert (scheduler.live, scheduler.waiting) == (2, 2)
    scheduler.remove("a")
    assert [name for name, _ in scheduler.admit()] == ["c"]


def test_sessions_with_work_take_turns() -> None:
    scheduler = Scheduler(3)
    for name in "abc":
        scheduler.add(name)
    scheduler.admit()
    turns = [scheduler.next(lambda name: name != "b") for _ in range(4)]
    assert turns == ["a", "c", "a", "c"]
    assert scheduler.next(lambda name: True) == "b"
    assert scheduler.next(lambda name: False) is None


def test_one_that_leaves_the_queue_is_never_admitted() -> None:
    scheduler = Scheduler(1)
    for name in "abc":
        scheduler.add(name)
    scheduler.admit()
    scheduler.remove("b")
    scheduler.remove("a")
    assert scheduler.admit() == [("c", 0)]


@given(st.integers(1, 4), st.lists(st.tuples(st.sampled_from(["add", "remove", "admit"]), st.integers(0, 9))))
def test_a_slot_has_one_owner_and_none_is_lost(slots: int, events: list[tuple[str, int]]) -> None:
    scheduler = Scheduler(slots)
    waiting: list[str] = []
    owners: dict[str, int] = {}
    for kind, number in events:
        name = str(number)
        if kind == "add" and name not in waiting and name not in owners:
            scheduler.add(name)
            waiting.append(name)
        elif kind == "remove":
            scheduler.remove(name)
            owners.pop(name, None)
            waiting = [other for other in waiting if other != name]
        elif kind == "admit":
            for admitted, slot in scheduler.admit():
                assert waiting.pop(0) == admitted
                owners[admitted] = slot
            assert not waiting or len(owners) == slots
        assert len(set(owners.values())) == len(owners) <= slots
        assert set(owners.values()) <= set(range(slots))
        assert (scheduler.live, scheduler.waiting) == (len(owners), len(waiting))
