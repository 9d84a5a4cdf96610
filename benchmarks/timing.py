# SPDX-License-Identifier: Apache-2.0
"""How long something takes on a device, many times, and what to say of so many numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from longlive_serve.backends.device_timer import DeviceTimer

WARM_UP = 3  # calls that are not timed: kernels are loaded and chosen in them


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, and how far the others lie from it."""
    percentiles = {f"p{percent}": float(np.percentile(values, percent)) for percent in (10, 90, 95)}
    return {"median": float(np.median(values)), **percentiles, "count": len(values)}


def seconds_of(call: Callable[[], object], device: str, runs: int) -> dict[str, float]:
    """The seconds of a call, one after the other as the device gets to them."""
    for _ in range(WARM_UP):
        call()
    timer = DeviceTimer(device)
    events = []
    for _ in range(runs):
        begin = timer.record()
        call()
        events.append((begin, timer.record()))
    return spread([timer.seconds(*pair) for pair in events])
