# SPDX-License-Identifier: Apache-2.0
"""Counts of session events. The fleet updates them; the report reads them."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

FAILURE, SCALE_DOWN = CAUSES = ("pod_failure", "scale_down")  # why a session moves


@dataclasses.dataclass(kw_only=True)
class SessionStats:
    already_live: int = 0
    arrived: int = 0
    completed: int = 0
    refused: int = 0
    lost: int = 0
    at_once: int = 0
    """Sessions that found a free slot on arrival, with one of their tries."""
    waits: list[float] = dataclasses.field(default_factory=list)
    """Seconds until a slot, of the sessions that waited and got one."""
    moved: Counter[str] = dataclasses.field(default_factory=Counter)
    stalls: Counter[str] = dataclasses.field(default_factory=Counter)
    longest_gap_s: float = 0.0

    def wait(self, percent: int) -> float:
        """Percentile of the waiting time, over all arrivals that got a slot."""
        count = self.at_once + len(self.waits)
        rank = math.ceil(percent * count / 100)
        return 0.0 if rank <= self.at_once else sorted(self.waits)[rank - self.at_once - 1]
