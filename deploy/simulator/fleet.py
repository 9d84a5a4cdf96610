# SPDX-License-Identifier: Apache-2.0
"""Pods and the sessions on them: who gets a slot, who waits, who is refused, who is moved. Exact, session by session.

Driven by the cluster, which tells it up to when to advance. It knows neither simpy nor the autoscaler. A session's id
decides which pod it is sent to, and a full pod sends it on: together, any pod with a free slot, each as likely.
"""

from __future__ import annotations

import dataclasses
import heapq
import random
from collections import Counter, deque

from deploy.simulator.arrivals import Arrivals
from deploy.simulator.policy import Service
from deploy.simulator.world import CHUNK_PLAYS_S, World

STARTING, READY, DRAINING, GONE = range(4)
FAILURE, SCALE_DOWN = CAUSES = ("pod_failure", "scale_down")  # what moves a session
SHUT = -1


class Pod:
    __slots__ = ("place", "sessions", "state")

    def __init__(self) -> None:
        self.state = STARTING
        self.sessions: dict[int, float] = {}
        """When each ends."""
        self.place = SHUT
        """Where it stands among the pods with a free slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """A session without a pod."""

    cause: str
    since: float
    noticed: float
    remaining: float
    slack: float
    """Seconds for which the viewer still has something to look at."""


@dataclasses.dataclass(kw_only=True)
class Tally:
    """What has happened so far."""

    already_live: int = 0
    arrived: int = 0
    completed: int = 0
    refused: int = 0
    lost: int = 0
    at_once: int = 0
    """Sessions that found a free slot when they came."""
    waits: list[float] = dataclasses.field(default_factory=list)
    """Of those who got one later."""
    moved: Counter[str] = dataclasses.field(default_factory=Counter)
    stalls: Counter[str] = dataclasses.field(default_factory=Counter)
    longest_gap_s: float = 0.0


class Fleet:
    """All pods, and the queue in front of them."""

    def __init__(self, world: World, service: Service, arrivals: Arrivals, seed: int) -> None:
        self.tally = Tally()
        self.live = 0
        self.ready = 0
        self.pods = 0
        """That hold a GPU, in whatever state."""
        self.unnoticed = 0
        """Sessions that broke off and whose clients do not know yet."""
        self.capacity = world.capacity
        self._world, self._service, self._arrivals = world, service, arrivals
        self._random = random.Random(seed)
        self._open: list[Pod] = []  # pods with a free slot
        self._ends: list[tuple[float, int, Pod]] = []  # a heap; of sessions that were moved, too
        self._number = 0  # of the last session
        self._waiting: deque[tuple[float, float]] = deque()  # when they came, how long they will stay
        self._broken: deque[Broken] = deque()
        self._gpu_s = 0.0

    @property
    def waiting(self) -> int:
        """Who wait for a slot, those who were watching already among them."""
        return len(self._waiting) + len(self._broken)

    @property
    def full(self) -> int:
        """Pods that take sessions but have no free slot."""
        return self.ready - len(self._open)

    def gpu_seconds(self, now: float) -> float:
        """That all pods together have held a GPU for."""
        return self._gpu_s + self.pods * now

    def order(self, now: float) -> Pod:
        """A new pod, which is to start."""
        self.pods += 1
        self._gpu_s -= now
        return Pod()

    def retire(self, pod: Pod, now: float) -> None:
        """The pod's GPU is given back."""
        pod.state = GONE
        self.pods -= 1
        self._gpu_s += now

    def begin(self) -> None:
        """Seat those who are live when the trace begins. The pods for them are to be ready."""
        for remaining in self._arrivals.already_live():
            if not self._open:
                break
            self.tally.already_live += 1
            self._seat(0.0, remaining)

    def add(self, pod: Pod, now: float) -> None:
        """The pod takes sessions."""
        pod.state = READY
        self.ready += 1
        self._reopen(pod)
        self._admit(now)

    def withdraw(self, pod: Pod, state: int) -> None:
        """The pod takes no more sessions."""
        assert pod.state == READY
        pod.state = state
        self.ready -= 1
        if pod.place != SHUT:
            self._shut(pod)

    def break_off(self, pod: Pod, now: float, cause: str, unnoticed_for: float = 0.0) -> list[Broken]:
        """The pod is gone, and its sessions are on no pod. Whoever calls this has them resumed when it is noticed."""
        chunk, lead, count = self._world.chunk_s, self._service.lead, len(pod.sessions)
        broken = []
        for end in pod.sessions.values():
            # A chunk comes when it may be made and those of other sessions have been; where in that cycle it broke off
            # is chance.
            delay = chunk * self._random.uniform(1, count)
            slack = lead * CHUNK_PLAYS_S - delay + CHUNK_PLAYS_S * self._random.random()
            noticed = now + unnoticed_for
            one = Broken(cause=cause, since=now, noticed=noticed, remaining=max(0.0, end - now), slack=slack)
            broken.append(one)
        self.live -= count
        self.unnoticed += count
        pod.sessions.clear()
        self.retire(pod, now)
        return broken

    def resume(self, broken: list[Broken], now: float) -> None:
        """Their clients have noticed and look for a slot."""
        self.unnoticed -= len(broken)
        self._broken += broken
        self._admit(now)

    def advance(self, until: float) -> None:
        """Let sessions come and go, each at its time."""
        ends = self._ends
        times, lengths = self._arrivals.until(until)
        for came, length in zip(times, lengths, strict=True):
            while ends and ends[0][0] <= came:
                self._end_first()
            self._arrive(came, length)
        while ends and ends[0][0] <= until:
            self._end_first()
        self._give_up(until)

    def _arrive(self, now: float, length: float) -> None:
        self.tally.arrived += 1
        if self._open:
            self.tally.at_once += 1
            self._seat(now, length)
            return
        self._give_up(now)
        if len(self._waiting) < self._service.max_waiting * self.ready:
            self._waiting.append((now, length))
        else:
            self.tally.refused += 1

    def _end_first(self) -> None:
        end, number, pod = heapq.heappop(self._ends)
        if pod.sessions.pop(number, None) is None:
            return  # it went on elsewhere
        self.tally.completed += 1
        self.live -= 1
        if pod.state == READY:
            if pod.place == SHUT:
                self._reopen(pod)
            if self._waiting or self._broken:
                self._admit(end)
        elif not pod.sessions:
            self.retire(pod, end)

    def _seat(self, now: float, length: float) -> Pod:
        pod = self._open[int(self._random.random() * len(self._open))]
        self._number += 1
        pod.sessions[self._number] = now + length
        heapq.heappush(self._ends, (now + length, self._number, pod))
        if len(pod.sessions) == self.capacity:
            self._shut(pod)
        self.live += 1
        return pod

    def _admit(self, now: float) -> None:
        """Give free slots to those who were watching already, then to those who wait longest."""
        self._give_up(now)
        while self._open and self._broken:
            self._go_on(self._broken.popleft(), now)
        while self._open and self._waiting:
            came, length = self._waiting.popleft()
            self.tally.waits.append(now - came)
            self._seat(now, length)

    def _go_on(self, broken: Broken, now: float) -> None:
        world, tally = self._world, self.tally
        others = len(self._seat(now, broken.remaining).sessions) - 1
        chunks = others * self._random.random() + world.recache_of_chunk + 1
        gap = now - broken.since + self._random.uniform(*world.reconnect_s) + chunks * world.chunk_s
        tally.moved[broken.cause] += 1
        tally.stalls[broken.cause] += gap > broken.slack
        tally.longest_gap_s = max(tally.longest_gap_s, gap)

    def _give_up(self, now: float) -> None:
        while self._waiting and now - self._waiting[0][0] > self._service.max_wait_s:
            self._waiting.popleft()
            self.tally.refused += 1
        while self._broken and now - self._broken[0].noticed > self._world.resume_for_s:
            self._broken.popleft()
            self.tally.lost += 1

    def _reopen(self, pod: Pod) -> None:
        pod.place = len(self._open)
        self._open.append(pod)

    def _shut(self, pod: Pod) -> None:
        last = self._open.pop()
        if last is not pod:
            last.place = pod.place
            self._open[pod.place] = last
        pod.place = SHUT
