# SPDX-License-Identifier: Apache-2.0
"""What the simulator takes for granted: GPUs, viewers and faults. The policy that meets it is in policy.toml."""

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
    """Times in seconds. Where a range is given, times are drawn from it evenly unless it says otherwise."""

    capacity: int = PROJECTED_CAPACITY
    """Live sessions of a pod, which has one GPU."""
    cold_start_s: tuple[float, float, float] = (120.0, 240.0, 600.0)
    """From the order of a pod until it is ready (machine, image, weights, graphs): least, most likely and most, of a
    triangular distribution."""
    mtbf_h: float = 720.0
    """Hours that a pod lives before it fails, on average; exponential."""
    silent_failures: float = 0.2
    """Share of failures in which no connection breaks, so that clients notice by the silence alone."""
    stall_timeout_s: float = 30.0
    """After which they do: the client's default."""
    resume_for_s: float = 60.0
    """For so long a client tries to go on elsewhere: its default."""
    back_off_s: tuple[float, float] = (0.1, 5.0)
    """Half of what it waits for at most before the second round of tries (doubled each time), and the most: the
    client's."""
    reconnect_s: tuple[float, float] = (0.05, 0.25)
    """A new connection, with the snapshot sent over it; for every try."""
    recache_of_chunk: float = 0.8
    """Time of a recache by the time of a chunk; by operations, 113 of 141.5 TFLOP."""
    session_median_s: float = 300.0
    session_sigma: float = 0.9
    """Lengths of sessions are lognormal: 9 in 10 are 1 to 22 minutes long, 7.5 minutes on average."""
    metric_delay_s: float = 30.0
    """How old metrics are when the autoscaler sees them: scraped, summed up, fetched."""
    goodbye_chunks: int = 2
    """That a pod that is told to go sends every viewer ahead, as servers do while they drain. They take five
    seconds for it at most; what admission leaves free of that is enough."""
    late_share: float = 5.6e-4
    """Chunks that come late on a pod without a free slot. None of 5349 did in the half hour of results/serving.json;
    this is the most that may be true of 95 in 100 such runs."""

    @property
    def chunk_s(self) -> float:
        """Time of a chunk, at most: with it, a server still admits `capacity` sessions."""
        return ServeConfig().max_utilization * CHUNK_PLAYS_S / self.capacity

    def slack(self, max_chunks_ahead: int, sessions: int, random: Random) -> float:
        """Seconds for which a viewer still has something to look at when a pod with so many sessions is gone."""
        # A chunk comes when it may be made and those of other sessions have been; where in that cycle it broke off is
        # chance.
        delay = self.chunk_s * random.uniform(1, sessions)
        return max_chunks_ahead * CHUNK_PLAYS_S - delay + CHUNK_PLAYS_S * random.random()

    def first_chunk_s(self, others: int, random: Random) -> float:
        """What a session that goes on beside others waits for its first chunk, once it has a slot."""
        return (others * random.random() + self.recache_of_chunk + 1) * self.chunk_s

    @property
    def mean_session_s(self) -> float:
        return self.session_median_s * math.exp(self.session_sigma**2 / 2)


def capacity(decoder: str, path: Path = MEASURED) -> tuple[int, str]:
    """Live sessions of a GPU and where the figure comes from: measured if it was, else projected."""
    kind = "tiny_vae" if decoder == TINY else "full_vae"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        sessions, run = record[f"live_sessions_{kind}"], record["benchmarks.engines"]
        if sessions:
            return int(sessions), f"measured on {run['hardware']} with {run['figures_of'][kind]}"
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return PROJECTED_CAPACITY, "projected, not measured"
