# SPDX-License-Identifier: Apache-2.0
"""Pods and the sessions on them: who gets a slot, who waits, who is refused, who is moved. Exact, session by session.

Driven by the cluster, which tells it up to when to advance. It knows neither simpy nor the autoscaler. Nobody knows
which pods have a free slot: a viewer's client tries one after another, and waits in the queue of the last.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial

from deploy.autoscaling_simulator.arrivals import Arrivals
from deploy.autoscaling_simulator.pod import DRAINING, GONE, READY, Broken, Pod, Waiting, put, take
from deploy.autoscaling_simulator.policy import Service
from deploy.autoscaling_simulator.report.tally import SCALE_DOWN, Tally
from deploy.autoscaling_simulator.world import World


class Fleet:
    """All pods, and all clients."""

    def __init__(self, world: World, service: Service, arrivals: Arrivals, seed: int) -> None:
        self.tally = Tally()
        self.live = 0
        self.waiting = 0
        """Who stand in the queues of pods, those who were watching already among them."""
        self.adrift = 0
        """Sessions that broke off and ask nobody for a slot: their clients do not know yet, or back off."""
        self.pods = 0
        """That hold a GPU, in whatever state."""
        self.capacity = world.capacity
        self._world, self._service, self._arrivals = world, service, arrivals
        self._random = random.Random(seed)
        self._open: list[Pod] = []  # ready, with a free slot
        self._full: list[Pod] = []  # ready, without one
        # A heap of sessions' ends (those of sessions that were moved, too) and of what is to be done at some time.
        self._events: list[tuple[float, int, Pod | Callable[[float], None]]] = []
        self._number = 0  # of the last event
        self._gpu_s = 0.0

    @property
    def ready(self) -> int:
        return len(self._open) + len(self._full)

    @property
    def full(self) -> int:
        """Pods that take sessions but have no free slot."""
        return len(self._full)

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
            self._seat(self._random.choice(self._open), 0.0, remaining)

    def add(self, pod: Pod) -> None:
        """The pod takes sessions. Those who wait at others do not hear of it."""
        pod.state = READY
        put(pod, self._open)

    def withdraw(self, pod: Pod) -> None:
        """The pod takes no more sessions, but those in its queue as long as it is there."""
        assert pod.state == READY
        pod.state = DRAINING
        take(pod, self._open if len(pod.sessions) < self.capacity else self._full)

    def break_off(self, pod: Pod, now: float, cause: str, unnoticed_for: float = 0.0) -> list[Broken]:
        """The pod is gone, and its sessions are on no pod. Whoever calls this has them resumed when it is noticed.

        Those in its queue get an error. Sessions that broke off before are among those that look further; a viewer who
        has seen nothing yet is refused.
        """
        count, noticed = len(pod.sessions), now + unnoticed_for
        broken = [waiting.broken for waiting in pod.queue if waiting.broken is not None]
        self.tally.refused += len(pod.queue) - len(broken)
        self.waiting -= len(pod.queue)
        max_chunks_ahead = self._service.max_chunks_ahead + (self._world.goodbye_chunks if cause == SCALE_DOWN else 0)
        for end in pod.sessions.values():
            slack = self._world.slack(max_chunks_ahead, count, self._random)
            one = Broken(cause=cause, since=now, noticed=noticed, remaining=max(0.0, end - now), slack=slack)
            broken.append(one)
        self.live -= count
        self.adrift += len(broken)
        pod.queue.clear()
        pod.sessions.clear()
        self.retire(pod, now)
        return broken

    def resume(self, broken: list[Broken], now: float) -> None:
        """Their clients have noticed and look for a slot."""
        for one in broken:
            if one.rounds:
                self._back_off(one, now)
            else:
                self._look_for_a_slot(one, now)

    def advance(self, until: float) -> None:
        """Let sessions come and go, each at its time."""
        events = self._events
        times, lengths = self._arrivals.until(until)
        for came, length in zip(times, lengths, strict=True):
            while events and events[0][0] <= came:
                self._next_event()
            self._arrive(came, length)
        while events and events[0][0] <= until:
            self._next_event()

    def _next_event(self) -> None:
        now, number, what = heapq.heappop(self._events)
        if isinstance(what, Pod):
            self._end(number, what, now)
        else:
            what(now)

    def _at(self, time: float, what: Pod | Callable[[float], None]) -> int:
        """Returns the event's number."""
        self._number += 1
        heapq.heappush(self._events, (time, self._number, what))
        return self._number

    def _arrive(self, now: float, length: float) -> None:
        self.tally.arrived += 1
        pod, _ = self._draw()
        if pod is None:
            self.tally.refused += 1
        elif len(pod.sessions) < self.capacity:
            self.tally.at_once += 1
            self._seat(pod, now, length)
        else:
            self._wait(pod, Waiting(since=now, length=length))

    def _draw(self) -> tuple[Pod | None, int]:
        """The first with a free slot of the pods that a client tries, or else the last of them; how many it tried.

        The pod is the one that the hash of the try's id names, and each try has a new id: any pod, each as likely. The
        proxy's limit of 125 % of the mean only makes that better, by what it knows: all, if every session comes through
        one proxy; the more proxies there are, the less each has seen, and the hash alone is what is left.
        """
        open_, full, max_attempts = self._open, self._full, self._service.max_attempts
        ready = len(open_) + len(full)
        if not ready:
            return None, max_attempts
        for tried in range(1, max_attempts + 1):
            number = int(self._random.random() * ready)
            if number < len(open_):
                return open_[number], tried
        return full[number - len(open_)], max_attempts

    def _seat(self, pod: Pod, now: float, length: float) -> None:
        end = now + length
        pod.sessions[self._at(end, pod)] = end
        if len(pod.sessions) == self.capacity and pod.state == READY:
            take(pod, self._open)
            put(pod, self._full)
        self.live += 1

    def _end(self, number: int, pod: Pod, now: float) -> None:
        if pod.sessions.pop(number, None) is None:
            return  # it went on elsewhere
        self.tally.completed += 1
        self.live -= 1
        if pod.state == READY and len(pod.sessions) == self.capacity - 1:
            take(pod, self._full)
            put(pod, self._open)
        if pod.queue:
            self._admit(pod, now)
        elif pod.state != READY and not pod.sessions:
            self.retire(pod, now)

    def _wait(self, pod: Pod, waiting: Waiting) -> None:
        """In the pod's queue, if that is not too long with them."""
        pod.line_up(waiting)
        self.waiting += 1
        if len(pod.queue) > self._service.max_waiting:
            self._turn_away(pod, pod.queue[-1], waiting.since)
        if waiting in pod.queue:
            self._at(waiting.since + self._service.max_wait_s, partial(self._turn_away, pod, waiting))

    def _turn_away(self, pod: Pod, waiting: Waiting, now: float) -> None:
        if waiting not in pod.queue:
            return  # long since seated
        pod.queue.remove(waiting)
        self.waiting -= 1
        if waiting.broken is None:
            self.tally.refused += 1
        else:
            self.adrift += 1
            self._back_off(waiting.broken, now)

    def _admit(self, pod: Pod, now: float) -> None:
        """Give the pod's free slot to the first in its queue."""
        waiting = pod.queue.pop(0)
        self.waiting -= 1
        if waiting.broken is None:
            self.tally.waits.append(now - waiting.since)
            self._seat(pod, now, waiting.length)
        else:
            self._go_on(waiting.broken, pod, now)

    def _look_for_a_slot(self, broken: Broken, now: float) -> None:
        """A round of tries. How long they take counts in the gap, but does not delay them."""
        pod, tried = self._draw()
        broken.rounds += 1
        broken.connecting_s += sum(self._random.uniform(*self._world.reconnect_s) for _ in range(tried))
        self.adrift -= pod is not None
        if pod is None:
            self._back_off(broken, now)
        elif len(pod.sessions) < self.capacity:
            self._go_on(broken, pod, now)
        else:
            self._wait(pod, Waiting(since=now, length=broken.remaining, broken=broken))

    def _back_off(self, broken: Broken, now: float) -> None:
        """As the client does it after a round: it asks whether it is too late before it pauses, and not after."""
        world = self._world
        if now - broken.noticed >= world.resume_for_s:
            self.adrift -= 1
            self.tally.lost += 1
            return
        first, most = world.back_off_s
        pause = min(most, first * 2**broken.rounds) * self._random.uniform(0.5, 1.0)
        self._at(now + pause, partial(self._look_for_a_slot, broken))

    def _go_on(self, broken: Broken, pod: Pod, now: float) -> None:
        world, tally = self._world, self.tally
        gap = now - broken.since + broken.connecting_s + world.first_chunk_s(len(pod.sessions), self._random)
        self._seat(pod, now, broken.remaining)
        tally.moved[broken.cause] += 1
        tally.stalls[broken.cause] += gap > broken.slack
        tally.longest_gap_s = max(tally.longest_gap_s, gap)
