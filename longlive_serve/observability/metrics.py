# SPDX-License-Identifier: Apache-2.0
"""The server's metrics: names, descriptions and current values.

Updated by the engine core's worker; `model.py` exports them through Triton.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
import urllib.request
from collections.abc import Sequence

GAUGE, COUNTER = "gauge", "counter"
BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)  # upper bounds, of all histograms


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A metric, with a value for each combination of its labels."""

    kind: str
    description: str


def _histogram(name: str, description: str) -> dict[str, Family]:
    """A Prometheus histogram as three counters: Triton's Python backend has no histograms."""
    parts = {"bucket": "at most `le` seconds", "sum": "total seconds", "count": "number"}
    return {
        f"{name}_{part}": Family(kind=COUNTER, description=f"{description}: {text}") for part, text in parts.items()
    }


FAMILIES: dict[str, Family] = {
    "live_sessions": Family(kind=GAUGE, description="sessions with a slot"),
    "waiting_sessions": Family(kind=GAUGE, description="sessions that wait for a slot"),
    "slots": Family(kind=GAUGE, description="slots of the KV cache"),
    "capacity_sessions": Family(
        kind=GAUGE, description="sessions at 16 frames per second that can be admitted in total"
    ),
    "playback_lead_seconds": Family(kind=GAUGE, description="shortest time until the playback of a next chunk"),
    "kv_cache_bytes": Family(kind=GAUGE, description="size of the KV cache of all slots"),
    "info": Family(kind=GAUGE, description="always 1; the labels describe the served model"),
    "start_seconds": Family(kind=GAUGE, description="duration of the start, by phase"),
    "chunks": Family(kind=COUNTER, description="chunks generated"),
    "frames": Family(kind=COUNTER, description="video frames generated"),
    "bytes": Family(kind=COUNTER, description="bytes of frames sent, as encoded"),
    "phase_seconds": Family(kind=COUNTER, description="time spent on chunks, by phase"),
    "failed_sessions": Family(kind=COUNTER, description="sessions that ended with an error"),
    "refused_sessions": Family(kind=COUNTER, description="sessions refused without a slot"),
    "redirected_sessions": Family(
        kind=COUNTER, description="sessions without a slot whose client asks another server instead of waiting"
    ),
    "resumed_sessions": Family(kind=COUNTER, description="sessions started from a snapshot"),
    "deadline_misses": Family(kind=COUNTER, description="chunks generated after their playback time"),
    **_histogram("chunk_seconds", "time to generate a chunk"),
    **_histogram("first_frame_seconds", "from START to the first frames"),
    **_histogram("switch_seconds", "from a new prompt to its first frames"),
}

Labels = tuple[tuple[str, str], ...]
MetricUpdate = tuple[str, Labels, float]


class Metrics:
    """The value of every metric, and which ones have changed since the last `collect_updates`."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, Labels], float] = {}
        self._changed: dict[tuple[str, Labels], None] = {}
        for name, family in FAMILIES.items():
            if name not in ("info", "phase_seconds", "start_seconds") and not name.endswith("_bucket"):
                self.set(name, 0.0 if family.kind == COUNTER else 0)

    def set(self, name: str, value: float, **labels: str) -> None:
        assert name in FAMILIES, name
        key = (name, tuple(labels.items()))
        if self._values.get(key) != value:
            self._values[key] = value
            self._changed[key] = None

    def add(self, name: str, value: float = 1, **labels: str) -> None:
        self.set(name, self._values.get((name, tuple(labels.items())), 0) + value, **labels)

    def observe(self, name: str, seconds: float) -> None:
        """Count `seconds` in the histogram `name`."""
        first = bisect.bisect_left(BUCKETS_S, seconds)
        for number, end in enumerate((*map(str, BUCKETS_S), "+Inf")):
            self.add(f"{name}_bucket", int(number >= first), le=end)
        self.add(f"{name}_sum", seconds)
        self.add(f"{name}_count")

    def collect_updates(self) -> Sequence[MetricUpdate]:
        updates = [(name, labels, self._values[name, labels]) for name, labels in self._changed]
        self._changed.clear()
        return updates


def sessions_at(metrics_url: str) -> int | None:
    """Live and waiting sessions of a server, read from its metrics; None: they cannot be read."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(metrics_url, timeout=5) as response:
            text = response.read().decode()
    except (OSError, ValueError):
        return None
    names = ("longlive_live_sessions", "longlive_waiting_sessions")
    found = [re.search(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE) for name in names]
    return sum(int(float(match[1])) for match in found if match) if all(found) else None
