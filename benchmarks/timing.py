# SPDX-License-Identifier: Apache-2.0
"""Times calls on a device and summarizes the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from longlive_serve.backends.device_timer import DeviceTimer

WARM_UP = 3  # untimed calls, which load and select kernels


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, percentiles and count of `values`."""
    percentiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in (10, 90, 95)}
    return {"median": float(np.median(values)), **percentiles, "count": len(values)}


def seconds_of(call: Callable[[], object], device: str, runs: int) -> dict[str, float]:
    """Device time of `runs` consecutive calls, in seconds, after WARM_UP untimed ones."""
    for _ in range(WARM_UP):
        call()
    timer = DeviceTimer(device)
    events = []
    for _ in range(runs):
        begin = timer.record()
        call()
        events.append((begin, timer.record()))
    return spread([timer.seconds(*pair) for pair in events])
