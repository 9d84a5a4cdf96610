# SPDX-License-Identifier: Apache-2.0
"""Pods and their sessions: which sessions get a slot, wait, are refused or move. Exact, session by session.

The cluster advances it. It knows neither simpy nor the autoscaler. Clients do not know which pods have a free slot: a
client tries one pod after another and waits in the queue of the last.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from functools import partial

from deploy.autoscaling_simulator.arrivals import Arrivals
from deploy.autoscaling_simulator.pod import (
    DRAINING,
    GONE,
    READY,
    DisconnectedSession,
    Pod,
    QueuedSession,
    append_pod,
    remove_pod,
)
from deploy.autoscaling_simulator.policy import Service
from deploy.autoscaling_simulator.report.session_stats import SCALE_DOWN, SessionStats
from deploy.autoscaling_simulator.sim_config import SimConfig


class Fleet:
    """All pods, and all clients."""

    def __init__(self, config: SimConfig, service: Service, arrivals: Arrivals, seed: int) -> None:
        self.stats = SessionStats()
        self.live = 0
        self.queued = 0
        """Sessions in the queues of pods, including disconnected ones."""
        self.num_disconnected = 0
        """Disconnected sessions outside of all queues: the client has not noticed yet, or backs off."""
        self.pods = 0
        """Pods that hold a GPU, in any state."""
        self.capacity = config.capacity
        self._config, self._service, self._arrivals = config, service, arrivals
        self._random = random.Random(seed)
        self._open: list[Pod] = []  # ready, with a free slot
        self._full: list[Pod] = []  # ready, without one
        # A heap of session ends (stale ones of moved sessions included) and scheduled callbacks.
        self._events: list[tuple[float, int, Pod | Callable[[float], None]]] = []
        self._number = 0  # of the last event
        self._gpu_s = 0.0

    @property
    def ready(self) -> int:
        return len(self._open) + len(self._full)

    @property
    def full(self) -> int:
        """Ready pods without a free slot."""
        return len(self._full)

    def gpu_seconds(self, now: float) -> float:
        """GPU time of all pods so far."""
        return self._gpu_s + self.pods * now

    def create_pod(self, now: float) -> Pod:
        """A new pod, in the state STARTING."""
        self.pods += 1
        self._gpu_s -= now
        return Pod()

    def release_pod(self, pod: Pod, now: float) -> None:
        """Release the pod's GPU."""
        pod.state = GONE
        self.pods -= 1
        self._gpu_s += now

    def start(self) -> None:
        """Assign the sessions that are live at the start of the trace. Their pods must be ready."""
        for remaining in self._arrivals.already_live():
            if not self._open:
                break
            self.stats.already_live += 1
            self._assign(self._random.choice(self._open), 0.0, remaining)

    def add(self, pod: Pod) -> None:
        """Let the pod accept sessions. Sessions in other pods' queues stay there."""
        pod.state = READY
        append_pod(pod, self._open)

    def start_draining(self, pod: Pod) -> None:
        """The pod accepts no new sessions, but still serves its queue."""
        assert pod.state == READY
        pod.state = DRAINING
        remove_pod(pod, self._open if len(pod.sessions) < self.capacity else self._full)

    def terminate(self, pod: Pod, now: float, cause: str, detection_delay: float = 0.0) -> list[DisconnectedSession]:
        """Remove the pod. Returns its disconnected sessions; the caller resumes them once their clients notice.

        Queued sessions get an error: disconnected ones are returned as well, new ones are refused.
        """
        count, detected_at = len(pod.sessions), now + detection_delay
        disconnected = [queued.disconnected for queued in pod.queue if queued.disconnected is not None]
        self.stats.refused += len(pod.queue) - len(disconnected)
        self.queued -= len(pod.queue)
        max_chunks_ahead = self._service.max_chunks_ahead + (self._config.goodbye_chunks if cause == SCALE_DOWN else 0)
        for end in pod.sessions.values():
            slack = self._config.slack(max_chunks_ahead, count, self._random)
            one = DisconnectedSession(
                cause=cause, since=now, detected_at=detected_at, remaining=max(0.0, end - now), slack=slack
            )
            disconnected.append(one)
        self.live -= count
        self.num_disconnected += len(disconnected)
        pod.queue.clear()
        pod.sessions.clear()
        self.release_pod(pod, now)
        return disconnected

    def resume(self, disconnected: list[DisconnectedSession], now: float) -> None:
        """The clients have noticed and look for a slot."""
        for one in disconnected:
            if one.rounds:
                self._retry_later(one, now)
            else:
                self._find_slot(one, now)

    def advance(self, until: float) -> None:
        """Process arrivals and events up to `until`, in time order."""
        events = self._events
        times, lengths = self._arrivals.until(until)
        for arrival_time, length in zip(times, lengths, strict=True):
            while events and events[0][0] <= arrival_time:
                self._next_event()
            self._arrive(arrival_time, length)
        while events and events[0][0] <= until:
            self._next_event()

    def _next_event(self) -> None:
        now, number, event = heapq.heappop(self._events)
        if isinstance(event, Pod):
            self._complete(number, event, now)
        else:
            event(now)

    def _schedule(self, time: float, event: Pod | Callable[[float], None]) -> int:
        """Returns the event's number."""
        self._number += 1
        heapq.heappush(self._events, (time, self._number, event))
        return self._number

    def _arrive(self, now: float, length: float) -> None:
        self.stats.arrived += 1
        pod, _ = self._choose_pod()
        if pod is None:
            self.stats.refused += 1
        elif len(pod.sessions) < self.capacity:
            self.stats.at_once += 1
            self._assign(pod, now, length)
        else:
            self._enqueue(pod, QueuedSession(since=now, length=length))

    def _choose_pod(self) -> tuple[Pod | None, int]:
        """The first pod with a free slot among those that a client tries, else the last one; and the number of tries.

        The proxy hashes the session id, which is new for each try, so every pod is equally likely. The proxy's limit of
        125 % of the mean load only improves on this: a single proxy sees all sessions, but with more proxies each one
        sees fewer, which leaves the hash.
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

    def _assign(self, pod: Pod, now: float, length: float) -> None:
        end = now + length
        pod.sessions[self._schedule(end, pod)] = end
        if len(pod.sessions) == self.capacity and pod.state == READY:
            remove_pod(pod, self._open)
            append_pod(pod, self._full)
        self.live += 1

    def _complete(self, number: int, pod: Pod, now: float) -> None:
        if pod.sessions.pop(number, None) is None:
            return  # it moved to another pod
        self.stats.completed += 1
        self.live -= 1
        if pod.state == READY and len(pod.sessions) == self.capacity - 1:
            remove_pod(pod, self._full)
            append_pod(pod, self._open)
        if pod.queue:
            self._admit(pod, now)
        elif pod.state != READY and not pod.sessions:
            self.release_pod(pod, now)

    def _enqueue(self, pod: Pod, queued: QueuedSession) -> None:
        """Append to the pod's queue; reject the last one if the queue is too long."""
        pod.enqueue(queued)
        self.queued += 1
        if len(pod.queue) > self._service.max_waiting:
            self._reject(pod, pod.queue[-1], queued.since)
        if queued in pod.queue:
            self._schedule(queued.since + self._service.max_wait_s, partial(self._reject, pod, queued))

    def _reject(self, pod: Pod, queued: QueuedSession, now: float) -> None:
        if queued not in pod.queue:
            return  # already admitted
        pod.queue.remove(queued)
        self.queued -= 1
        if queued.disconnected is None:
            self.stats.refused += 1
        else:
            self.num_disconnected += 1
            self._retry_later(queued.disconnected, now)

    def _admit(self, pod: Pod, now: float) -> None:
        """Give the pod's free slot to the first in its queue."""
        queued = pod.queue.pop(0)
        self.queued -= 1
        if queued.disconnected is None:
            self.stats.waits.append(now - queued.since)
            self._assign(pod, now, queued.length)
        else:
            self._continue(queued.disconnected, pod, now)

    def _find_slot(self, disconnected: DisconnectedSession, now: float) -> None:
        """One round of tries. Their duration counts in the gap, but does not delay the next event."""
        pod, tried = self._choose_pod()
        disconnected.rounds += 1
        disconnected.connect_s += sum(self._random.uniform(*self._config.reconnect_s) for _ in range(tried))
        self.num_disconnected -= pod is not None
        if pod is None:
            self._retry_later(disconnected, now)
        elif len(pod.sessions) < self.capacity:
            self._continue(disconnected, pod, now)
        else:
            self._enqueue(pod, QueuedSession(since=now, length=disconnected.remaining, disconnected=disconnected))

    def _retry_later(self, disconnected: DisconnectedSession, now: float) -> None:
        """Like the client after a round: it checks `resume_for_s` before the pause, not after it."""
        config = self._config
        if now - disconnected.detected_at >= config.resume_for_s:
            self.num_disconnected -= 1
            self.stats.lost += 1
            return
        first, most = config.back_off_s
        pause = min(most, first * 2**disconnected.rounds) * self._random.uniform(0.5, 1.0)
        self._schedule(now + pause, partial(self._find_slot, disconnected))

    def _continue(self, disconnected: DisconnectedSession, pod: Pod, now: float) -> None:
        config, stats = self._config, self.stats
        gap = now - disconnected.since + disconnected.connect_s + config.first_chunk_s(len(pod.sessions), self._random)
        self._assign(pod, now, disconnected.remaining)
        stats.moved[disconnected.cause] += 1
        stats.stalls[disconnected.cause] += gap > disconnected.slack
        stats.longest_gap_s = max(stats.longest_gap_s, gap)
