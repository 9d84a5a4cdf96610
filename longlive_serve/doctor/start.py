# SPDX-License-Identifier: Apache-2.0
"""How long a server takes to start: the real one is started, first without caches of compiled kernels, then with them.

Called by the command line with `--start`. Weights may lie in the memory of the operating system both times.
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
from longlive_serve.doctor.check_result import OK, PROBLEM, CheckResult
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.launcher import TritonServer

COLD, CACHED = "cold", "cached"
READY, TRITON = "ready", "triton"
CACHES = {"XDG_CACHE_HOME": "cudnn", "TRITON_CACHE_DIR": "triton", "CUDA_CACHE_PATH": "cuda"}
"""The variables that say where compiled kernels are kept, and names for folders in their place."""


def measure(config: Path) -> dict[str, dict[str, float]]:
    """Seconds of a start COLD and CACHED: until it is READY, of that TRITON's own, and by phase.

    Raises ServerStartError.
    """
    with tempfile.TemporaryDirectory(prefix="longlive-caches-") as folder, _caches_in(Path(folder)):
        return {name: _start(config) for name in (COLD, CACHED)}


def results(starts: Mapping[str, Mapping[str, float]]) -> list[CheckResult]:
    texts = {COLD: "with empty caches", CACHED: "with its caches"}
    found = []
    for name, text in texts.items():
        phases = {key: took for key, took in starts[name].items() if key != READY}
        found.append(CheckResult(OK, text, f"ready after {starts[name][READY]:.1f} s: {describe(phases)}"))
    return found


def failure(error: ServerStartError) -> CheckResult:
    return CheckResult(PROBLEM, "start", str(error), "what its log says there")


def _start(config: Path) -> dict[str, float]:
    began = time.monotonic()
    with TritonServer(config=config) as server:
        ready = time.monotonic() - began
        phases = _phases(server.metrics_url)
    return {READY: ready, TRITON: ready - sum(phases.values()), **phases}


def _phases(metrics_url: str) -> dict[str, float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{metrics_url}/metrics", timeout=10) as response:
        text = response.read().decode()
    found = dict(re.findall(r'^longlive_start_seconds{.*phase="(\w+)".*} (\S+)$', text, re.MULTILINE))
    return {name: float(found[name]) for name in PHASES}


@contextlib.contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """Processes that are started meanwhile keep compiled kernels there."""
    before = {name: os.environ.get(name) for name in CACHES}
    os.environ.update({name: str(folder / own) for name, own in CACHES.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
