# SPDX-License-Identifier: Apache-2.0
"""A pod, who stands in its queue, and groups of pods. The fleet's bookkeeping; nothing here knows a time or chance."""

from __future__ import annotations

import dataclasses

STARTING, READY, DRAINING, GONE = range(4)


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class DisconnectedSession:
    """A session without a pod, from when it broke off until it goes on."""

    cause: str
    since: float
    detected_at: float
    remaining: float
    slack: float
    """Seconds for which the viewer still has something to look at."""
    rounds: int = 0
    """Of tries to go on, so far."""
    connect_s: float = 0.0
    """What these tries took."""


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class QueuedSession:
    """Somebody in a pod's queue: a viewer who has seen nothing yet, or one whose session broke off."""

    since: float
    length: float
    disconnected: DisconnectedSession | None = None


class Pod:
    __slots__ = ("place", "queue", "sessions", "state")

    def __init__(self) -> None:
        self.state = STARTING
        self.sessions: dict[int, float] = {}
        """When each ends."""
        self.queue: list[QueuedSession] = []
        """First come, first served, but sessions that broke off before new ones."""
        self.place = 0
        """Where it stands among the ready pods that are full, or among those that are not."""

    def enqueue(self, queued: QueuedSession) -> None:
        """As the server's scheduler does it."""
        behind = sum(other.disconnected is not None for other in self.queue) if queued.disconnected else len(self.queue)
        self.queue.insert(behind, queued)


def append_pod(pod: Pod, group: list[Pod]) -> None:
    pod.place = len(group)
    group.append(pod)


def remove_pod(pod: Pod, group: list[Pod]) -> None:
    """Out of the group that it is in, whose last takes its place."""
    last = group.pop()
    if last is not pod:
        last.place = pod.place
        group[pod.place] = last
