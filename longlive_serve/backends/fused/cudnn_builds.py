# SPDX-License-Identifier: Apache-2.0
"""Builds cuDNN plans in parallel processes and caches them on disk.

Called by `Cudnn`. cuDNN compiles a kernel for each plan, which takes seconds and blocks all other threads of the
process. Compilation needs only the device's properties, not the device.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import torch

from longlive_serve.backends.fused.cudnn_graphs import GraphSpec, NoPlanError, build_first, kernels
from longlive_serve.backends.fused.cudnn_plan_cache import PlanCache
from longlive_serve.backends.start_up import COMPILE, phase

log = logging.getLogger(__name__)


class Task(NamedTuple):
    spec: GraphSpec
    kernel: str
    """Name of the kernel. If it cannot be built, the next in cuDNN's order is used, unless `exact`."""
    exact: bool = False


class SerializedPlan(NamedTuple):
    kernel: str
    plan: bytes
    """As the frontend serializes it."""


class Builds:
    """Plans for one device."""

    def __init__(self, properties: str, cache: PlanCache, processes: int | None = None) -> None:
        """properties: device properties, serialized by the frontend. processes: default one per core, up to 16."""
        import cudnn

        self._properties, self._cache = properties, cache
        self._processes = processes or min(16, len(os.sched_getaffinity(0)))  # each loads PyTorch
        self._versions = f"cuDNN {cudnn.backend_version()}, frontend {cudnn.__version__}, torch {torch.__version__}"

    def key(self, *parts: object) -> str:
        """Key of a cache entry for this device and these versions."""
        return "\n".join((self._versions, self._properties, *map(str, parts)))

    def __call__(self, tasks: Sequence[Task]) -> list[SerializedPlan | NoPlanError]:
        """A plan for each task, or the error."""
        found = [self._get_cached(task) for task in tasks]
        missing = [task for task, cached in zip(tasks, found, strict=True) if cached is None]
        made = iter(self._build(missing))
        return [next(made) if cached is None else cached for cached in found]

    def _get_cached(self, task: Task) -> SerializedPlan | None:
        cached = self._cache.get(self.key(*task))
        if cached is None:
            return None
        kernel, _, plan = cached.partition(b"\0")
        return SerializedPlan(kernel.decode(), plan)

    @phase(COMPILE)
    def _build(self, tasks: Sequence[Task]) -> list[SerializedPlan | NoPlanError]:
        made: list[SerializedPlan | NoPlanError] = []
        if (processes := min(self._processes, len(tasks))) > 1:
            try:
                with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
                    made += pool.map(build, [self._properties] * len(tasks), tasks)
            except (BrokenProcessPool, OSError) as error:
                log.warning("cuDNN: building plans one by one in this process, as worker processes failed: %s", error)
                made.clear()
        made = made or [build(self._properties, task) for task in tasks]
        for task, one in zip(tasks, made, strict=True):
            if isinstance(one, SerializedPlan):
                self._cache.put(self.key(*task), b"\0".join((one.kernel.encode(), one.plan)))
        return made


def build(properties: str, task: Task) -> SerializedPlan | NoPlanError:
    """Runs in a worker process, so errors are returned."""
    import cudnn

    number = task.kernel.rpartition("=")[2]
    try:
        graph = task.spec.graph(cudnn, device_property=cudnn.create_device_properties(properties))
        found = kernels(cudnn, graph, [int(number)] if number.isdigit() else [])
        kernel = build_first(graph, found, task.kernel, task.exact)
    except NoPlanError as error:
        return error
    return SerializedPlan(kernel, bytes(graph.serialize()))
