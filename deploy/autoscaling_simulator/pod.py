# SPDX-License-Identifier: Apache-2.0
"""A pod, its queue, and groups of pods. Bookkeeping of the fleet, without time or randomness."""

from __future__ import annotations

import dataclasses

STARTING, READY, DRAINING, GONE = range(4)


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class DisconnectedSession:
    """A session without a pod, from the disconnect until it resumes."""

    cause: str
    since: float
    detected_at: float
    remaining: float
    slack: float
    """Seconds of buffered video at the viewer."""
    rounds: int = 0
    """Rounds of tries to resume so far."""
    connect_s: float = 0.0
    """Seconds that these tries took."""


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class QueuedSession:
    """An entry of a pod's queue: a new session or a disconnected one."""

    since: float
    length: float
    disconnected: DisconnectedSession | None = None


class Pod:
    __slots__ = ("place", "queue", "sessions", "state")

    def __init__(self) -> None:
        self.state = STARTING
        self.sessions: dict[int, float] = {}
        """End time by event number."""
        self.queue: list[QueuedSession] = []
        """Disconnected sessions before new ones; FIFO within each group."""
        self.place = 0
        """Index in the fleet's list of full or of open pods."""

    def enqueue(self, queued: QueuedSession) -> None:
        """In the order of the server's scheduler."""
        behind = sum(other.disconnected is not None for other in self.queue) if queued.disconnected else len(self.queue)
        self.queue.insert(behind, queued)


def append_pod(pod: Pod, group: list[Pod]) -> None:
    pod.place = len(group)
    group.append(pod)


def remove_pod(pod: Pod, group: list[Pod]) -> None:
    """Remove the pod in O(1): the last pod of the group takes its index."""
    last = group.pop()
    if last is not pod:
        last.place = pod.place
        group[pod.place] = last
