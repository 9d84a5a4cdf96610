# SPDX-License-Identifier: Apache-2.0
"""Measures how long a server takes to start: a real one is started twice, with empty caches of kernels and again.

Called by the command line with `--start`. The operating system may have the weights in its page cache both times.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.backends.start_up import PHASES, describe
from longlive_serve.doctor.check_result import OK, CheckResult
from longlive_serve.triton_server.launcher import TritonServer

COLD, CACHED = "cold", "cached"
READY, TRITON = "ready", "triton"
LABELS = {COLD: "empty caches", CACHED: "warm caches"}
CACHES = {"XDG_CACHE_HOME": "cudnn", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
"""The variables that name the caches of compiled kernels, and a folder for each."""


def measure_starts(config: Path) -> dict[str, dict[str, float]]:
    """Seconds of a COLD and a CACHED start: READY is the whole, TRITON and PHASES are its parts.

    Raises ServerStartError.
    """
    with tempfile.TemporaryDirectory(prefix="longlive-caches-") as folder, _use_caches(Path(folder)):
        return {name: _start(config) for name in (COLD, CACHED)}


def format_starts(starts: Mapping[str, Mapping[str, float]]) -> list[CheckResult]:
    results = []
    for name, label in LABELS.items():
        phases = {key: seconds for key, seconds in starts[name].items() if key != READY}
        message = f"ready after {starts[name][READY]:.1f} s: {describe(phases)}"
        results.append(CheckResult(OK, label, message))
    return results


def _start(config: Path) -> dict[str, float]:
    start_time = time.monotonic()
    with TritonServer(config=config) as server:
        ready = time.monotonic() - start_time
        phases = _read_phases(server.metrics_url)
    return {READY: ready, TRITON: ready - sum(phases.values()), **phases}


def _read_phases(metrics_url: str) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{metrics_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    values = dict(re.findall(r'^longlive_start_seconds{.*phase="(\w+)".*} (\S+)$', text, re.MULTILINE))
    return {name: float(values[name]) for name in PHASES}


@contextlib.contextmanager
def _use_caches(folder: Path) -> Iterator[None]:
    """Processes that start within it keep compiled kernels in `folder`."""
    previous = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str(folder / cache) for name, cache in CACHES.items()})
    try:
        yield
    finally:
        for name, value in previous.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
