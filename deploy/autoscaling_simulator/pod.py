# SPDX-License-Identifier: Apache-2.0
"""A pod, who stands in its queue, and groups of pods. The fleet's bookkeeping; nothing here knows a time or chance."""

from __future__ import annotations

import dataclasses

STARTING, READY, DRAINING, GONE = range(4)


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class Broken:
    """A session without a pod, from when it broke off until it goes on."""

    cause: str
    since: float
    noticed: float
    remaining: float
    slack: float
    """Seconds for which the viewer still has something to look at."""
    rounds: int = 0
    """Of tries to go on, so far."""
    connecting_s: float = 0.0
    """What these tries took."""


@dataclasses.dataclass(kw_only=True, eq=False, slots=True)
class Waiting:
    """Somebody in a pod's queue: a viewer who has seen nothing yet, or one whose session broke off."""

    since: float
    length: float
    broken: Broken | None = None


class Pod:
    __slots__ = ("place", "queue", "sessions", "state")

    def __init__(self) -> None:
        self.state = STARTING
        self.sessions: dict[int, float] = {}
        """When each ends."""
        self.queue: list[Waiting] = []
        """First come, first served, but sessions that broke off before new ones."""
        self.place = 0
        """Where it stands among the ready pods that are full, or among those that are not."""

    def line_up(self, waiting: Waiting) -> None:
        """As the server's scheduler does it."""
        behind = sum(other.broken is not None for other in self.queue) if waiting.broken else len(self.queue)
        self.queue.insert(behind, waiting)


def put(pod: Pod, group: list[Pod]) -> None:
    pod.place = len(group)
    group.append(pod)


def take(pod: Pod, group: list[Pod]) -> None:
    """Out of the group that it is in, whose last takes its place."""
    last = group.pop()
    if last is not pod:
        last.place = pod.place
        group[pod.place] = last
