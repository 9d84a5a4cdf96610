# SPDX-License-Identifier: Apache-2.0
"""The simulator's assumptions about GPUs, viewers and faults. The autoscaling policy is in policy.toml."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from random import Random

from longlive_serve.config.presets import FPS, TINY, WindowConfig
from longlive_serve.config.serve_config import ServeConfig

MEASURED = Path(__file__).parents[2] / "results/gpu.json"
CHUNK_PLAYS_S = WindowConfig().chunk_frames / FPS
PROJECTED_CAPACITY = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimConfig:
    """Times in seconds. Values are drawn uniformly from ranges, unless stated otherwise."""

    capacity: int = PROJECTED_CAPACITY
    """Live sessions per pod (one GPU)."""
    cold_start_s: tuple[float, float, float] = (120.0, 240.0, 600.0)
    """From the creation of a pod until it is ready (machine, image, weights, graphs): minimum, mode and maximum of a
    triangular distribution."""
    mtbf_h: float = 720.0
    """Mean hours between failures of a pod, exponentially distributed."""
    silent_failures: float = 0.2
    """Share of failures that break no connection: clients notice only the missing chunks."""
    stall_timeout_s: float = 30.0
    """Time until clients notice such a failure: the client's default."""
    resume_for_s: float = 60.0
    """How long a client tries to resume on another server: its default."""
    back_off_s: tuple[float, float] = (0.1, 5.0)
    """Half of the maximum pause before the second round of tries (doubled for every round), and its upper limit: the
    client's values."""
    reconnect_s: tuple[float, float] = (0.05, 0.25)
    """Duration of a try: connect and send the snapshot."""
    recache_of_chunk: float = 0.8
    """Time of a recache relative to a chunk, estimated by FLOPs: 113 of 141.5 TFLOP."""
    session_median_s: float = 300.0
    session_sigma: float = 0.9
    """Session lengths are lognormal: 90 % are 1 to 22 minutes, the mean is 7.5 minutes."""
    metric_delay_s: float = 30.0
    """Age of the metrics that the autoscaler sees: scraped, aggregated, fetched."""
    goodbye_chunks: int = 2
    """Extra chunks that a draining server sends ahead to every viewer. It takes at most five seconds, in the time that
    admission control leaves free."""
    late_share: float = 5.6e-4
    """Share of late chunks on a pod without a free slot: the 95 % upper confidence bound for 0 late chunks of 5349
    (results/serving.json)."""

    @property
    def chunk_s(self) -> float:
        """The longest chunk time with which a server admits `capacity` sessions."""
        return ServeConfig().max_utilization * CHUNK_PLAYS_S / self.capacity

    def slack(self, max_chunks_ahead: int, sessions: int, random: Random) -> float:
        """Seconds of video buffered at a viewer when a pod with this many sessions is lost."""
        # A chunk follows those of the other sessions; the failure is at a random point of this cycle.
        delay = self.chunk_s * random.uniform(1, sessions)
        return max_chunks_ahead * CHUNK_PLAYS_S - delay + CHUNK_PLAYS_S * random.random()

    def first_chunk_s(self, others: int, random: Random) -> float:
        """Seconds from a slot to the first chunk, for a resumed session on a pod with `others`."""
        return (others * random.random() + self.recache_of_chunk + 1) * self.chunk_s

    @property
    def mean_session_s(self) -> float:
        return self.session_median_s * math.exp(self.session_sigma**2 / 2)


def capacity(decoder: str, path: Path = MEASURED) -> tuple[int, str]:
    """Live sessions per GPU, measured if available, else projected; and the source of the number."""
    kind = "tiny_vae" if decoder == TINY else "full_vae"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sessions, run = record[f"live_sessions_{kind}"], record["benchmarks.engines"]
        if sessions:
            return int(sessions), f"measured on {run['hardware']} with {run['figures_of'][kind]}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return PROJECTED_CAPACITY, "projected, not measured"
