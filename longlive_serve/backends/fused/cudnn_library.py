# SPDX-License-Identifier: Apache-2.0
"""Runs cuDNN graphs that PyTorch, which ships the library, has no API for.

Used by the fused backend for FP8 convolutions and attention. It needs the package `nvidia-cudnn-frontend`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longlive_serve.backends.device_timer import median_seconds
from longlive_serve.backends.fused.cudnn_builds import Builds, SerializedPlan, Task
from longlive_serve.backends.fused.cudnn_graphs import GraphSpec, Make, NoPlanError, Tensors, build_first, kernels
from longlive_serve.backends.fused.cudnn_plan_cache import PlanCache, cache_folder

log = logging.getLogger(__name__)

RUNS = 5
TOLERANCE = 0.05
"""Largest relative error between two kernels' results. Many differ by the rounding of FP8."""


class Plan(NamedTuple):
    graph: Any
    number: int | None
    """Index of the plan in the graph; None: the graph was deserialized with one plan."""


@dataclasses.dataclass(frozen=True, eq=False)
class PlanRequest:
    """A call that needs a plan."""

    spec: GraphSpec
    tensors: Tensors | None
    """Tensors to benchmark kernels with; None: no benchmark."""
    result: int
    group: str


class Cudnn:
    """Runs graphs on this thread's current stream. Plans are built on the first call of each size, or in parallel by
    `record_calls`: run each size once before capturing a CUDA graph."""

    def __init__(self) -> None:
        """Raises ImportError without the package."""
        import cudnn

        self._frontend, self._handle = cudnn, cudnn.create_handle()
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self._cache = PlanCache(cache_folder() / "cudnn")
        self._builds = Builds(cudnn.create_device_properties(device).serialize(), self._cache)
        self._can_load_plans = True
        """Whether plans built in another process can be loaded."""
        self._plans: dict[GraphSpec, Plan] = {}
        self._best_kernels: dict[str, str] = {}
        """Kernel name by group."""
        self._recorded: dict[GraphSpec, PlanRequest] | None = None

    def __call__(self, make: Make, tensors: Tensors, result: int, group: str) -> None:
        """`result`: uid of the output tensor. `group`: calls in a group share the kernel that is the fastest for the
        first of them.

        Raises NoPlanError.
        """
        spec = GraphSpec.of(make, tensors)
        if self._recorded is not None:
            first = all(other.group != group for other in self._recorded.values())
            self._recorded.setdefault(spec, PlanRequest(spec, tensors if first else None, result, group))
            tensors[result].copy_(torch.randn(tensors[result].shape, device=tensors[result].device))
            return
        if spec not in self._plans:
            self._prepare([PlanRequest(spec, tensors, result, group)])
        self._execute(self._plans[spec], tensors)

    @contextlib.contextmanager
    def record_calls(self) -> Iterator[None]:
        """Calls inside only record their sizes and output random numbers; on exit their plans are built in parallel.

        Raises NoPlanError.
        """
        recorded: dict[GraphSpec, PlanRequest] = {}
        self._recorded = recorded
        try:
            yield
        finally:
            self._recorded = None
        self._prepare(list(recorded.values()))

    def _execute(self, plan: Plan, tensors: Tensors) -> None:
        graph, number = plan
        size = graph.get_workspace_size() if number is None else graph.get_workspace_size_plan_at_index(number)
        workspace = torch.empty(max(1, size), dtype=torch.uint8, device=next(iter(tensors.values())).device)
        self._frontend.set_stream(self._handle, torch.cuda.current_stream().cuda_stream)
        pointers = {int(number): tensor.data_ptr() for number, tensor in tensors.items()}
        if number is None:
            graph.execute(pointers, workspace.data_ptr(), handle=self._handle)
        else:
            graph.execute_plan_at_index(pointers, workspace.data_ptr(), number, handle=self._handle)

    def _prepare(self, requests: Sequence[PlanRequest]) -> None:
        """Build the plans of all requests, with the fastest kernel of each group."""
        first_requests: dict[str, PlanRequest] = {}
        for one in requests:
            if one.group not in self._best_kernels:
                first_requests.setdefault(one.group, one)
        self._choose(first_requests)
        tasks = [Task(one.spec, self._best_kernels[one.group]) for one in requests if one.spec not in self._plans]
        for task, plan in zip(tasks, self._made(tasks), strict=True):
            if isinstance(plan, NoPlanError):
                raise plan
            self._plans[task.spec] = plan

    def _choose(self, first_requests: Mapping[str, PlanRequest]) -> None:
        """Benchmark the kernels of each group at the size of its first request."""
        tasks = []
        for group, one in first_requests.items():
            if cached := self._cache.get(self._key(one)):
                self._best_kernels[group] = cached.decode()
            else:
                found = kernels(self._frontend, one.spec.graph(self._frontend, handle=self._handle))
                tasks += [(one, Task(one.spec, name, exact=True)) for name in found]
        made = self._made([task for _, task in tasks])
        plans: dict[PlanRequest, dict[str, Plan]] = {one: {} for one, _ in tasks}
        for (one, task), plan in zip(tasks, made, strict=True):
            if isinstance(plan, Plan):
                plans[one][task.kernel] = plan
        for one, candidates in plans.items():
            self._best_kernels[one.group] = self._benchmark(one, candidates)
            self._cache.put(self._key(one), self._best_kernels[one.group].encode())

    def _key(self, one: PlanRequest) -> str:
        """Cache key of the fastest kernel of a group."""
        return self._builds.key("fastest", one.group, one.spec)

    def _made(self, tasks: Sequence[Task]) -> list[Plan | NoPlanError]:
        if self._can_load_plans:
            try:
                return [one if isinstance(one, NoPlanError) else self._load(one) for one in self._builds(tasks)]
            except (RuntimeError, self._frontend.cudnnGraphNotSupportedError) as error:
                log.warning("cuDNN: cannot load prebuilt plans (%s): building them one by one", error)
                self._can_load_plans = False
        return [self._build(task) for task in tasks]

    def _load(self, serialized: SerializedPlan) -> Plan:
        graph = self._frontend.pygraph(handle=self._handle)
        graph.deserialize(self._handle, list(serialized.plan))
        return Plan(graph, None)

    def _build(self, task: Task) -> Plan | NoPlanError:
        try:
            graph = task.spec.graph(self._frontend, handle=self._handle)
            found = kernels(self._frontend, graph)
            return Plan(graph, found[build_first(graph, found, task.kernel, task.exact)])
        except NoPlanError as error:
            return error

    def _benchmark(self, one: PlanRequest, plans: Mapping[str, Plan]) -> str:
        """The name of the fastest kernel that agrees with the first one; the first one if none runs."""
        if one.tensors is None or not plans:
            raise NoPlanError(f"cuDNN has plans for {one.group}, but none can be built")
        result, first, seconds, expected = one.tensors[one.result], next(iter(plans)), dict[str, float](), None
        for name, plan in plans.items():
            with contextlib.suppress(RuntimeError):  # other kernels remain
                run = functools.partial(self._execute, plan, one.tensors)
                taken = median_seconds(run, result.device.type, RUNS)
                expected = result.float() if expected is None else expected
                if (error := relative_error(result.float(), expected)) < TOLERANCE:
                    seconds[name] = taken
                else:
                    log.warning("cuDNN, %s: %s is wrong: error %.3g relative to %s", one.group, name, error, first)
        best = min(seconds, key=lambda name: seconds[name], default=first)
        shown = [name for name in dict.fromkeys((best, first)) if name in seconds]
        times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in shown)
        log.info("cuDNN, %s: %s of %d kernels (%s)", one.group, best, len(seconds), times)
        return best


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference divided by the norm of `expected`; inf if that is not finite."""
    error = ((got - expected).norm() / expected.norm()).item()
    return error if math.isfinite(error) else math.inf
