# SPDX-License-Identifier: Apache-2.0
"""cuDNN by its own graphs: what PyTorch, which brings the library, has no way to ask it for.

Used by the fused backend for products in FP8. It takes the package `nvidia-cudnn-frontend`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longlive_serve.backends.device_timer import DeviceTimer
from longlive_serve.backends.fused.cudnn_builds import Builds, Built, Task
from longlive_serve.backends.fused.cudnn_graphs import Blueprint, Make, NoPlanError, Tensors, build_first, kernels
from longlive_serve.backends.fused.cudnn_plan_cache import PlanCache, cache_folder

log = logging.getLogger(__name__)

RUNS = 5
AGREE = 0.05
"""Of two kernels' results: the norm of the difference as a share of the norm. Many are off by FP8's own rounding."""


class Plan(NamedTuple):
    graph: Any
    number: int | None
    """Which of the graph's; None: the one that was read."""


@dataclasses.dataclass(frozen=True, eq=False)
class Wanted:
    """A call whose plan is to be made."""

    blueprint: Blueprint
    tensors: Tensors | None
    """None: it is not measured with them."""
    result: int
    family: str


class Cudnn:
    """Runs graphs on this thread's current stream. Plans are made for each size of the tensors as they come, one after
    another, or many at a time for `noting`: run a size once before a CUDA graph is captured."""

    def __init__(self) -> None:
        """Raises ImportError without the package."""
        import cudnn

        self._frontend, self._handle = cudnn, cudnn.create_handle()
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        self._cache = PlanCache(cache_folder() / "cudnn")
        self._builds = Builds(cudnn.create_device_properties(device).serialize(), self._cache)
        self._readable = True
        """Plans that were built elsewhere can be loaded."""
        self._plans: dict[Blueprint, Plan] = {}
        self._fastest: dict[str, str] = {}
        """Names of kernels by family."""
        self._noted: dict[Blueprint, Wanted] | None = None

    def __call__(self, make: Make, tensors: Tensors, result: int, family: str) -> None:
        """`result`: the number of the tensor that is written. `family`: sizes that share the kernel that is the
        fastest for the first of them.

        Raises NoPlanError.
        """
        blueprint = Blueprint.of(make, tensors)
        if self._noted is not None:
            first = all(other.family != family for other in self._noted.values())
            self._noted.setdefault(blueprint, Wanted(blueprint, tensors if first else None, result, family))
            tensors[result].copy_(torch.randn(tensors[result].shape, device=tensors[result].device))
            return
        if blueprint not in self._plans:
            self._prepare([Wanted(blueprint, tensors, result, family)])
        self._execute(self._plans[blueprint], tensors)

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Calls within give random numbers; the plans that they need are made at the end, many at a time.

        Raises NoPlanError.
        """
        noted: dict[Blueprint, Wanted] = {}
        self._noted = noted
        try:
            yield
        finally:
            self._noted = None
        self._prepare(list(noted.values()))

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

    def _prepare(self, wanted: Sequence[Wanted]) -> None:
        """Plans for all of them, by the fastest kernel of each family."""
        firsts: dict[str, Wanted] = {}
        for one in wanted:
            if one.family not in self._fastest:
                firsts.setdefault(one.family, one)
        self._choose(firsts)
        tasks = [Task(one.blueprint, self._fastest[one.family]) for one in wanted if one.blueprint not in self._plans]
        for task, plan in zip(tasks, self._made(tasks), strict=True):
            if isinstance(plan, NoPlanError):
                raise plan
            self._plans[task.blueprint] = plan

    def _choose(self, firsts: Mapping[str, Wanted]) -> None:
        """Measure the kernels of some families, each at one size."""
        tasks = []
        for family, one in firsts.items():
            if kept := self._cache.get(self._key(one)):
                self._fastest[family] = kept.decode()
            else:
                found = kernels(self._frontend, one.blueprint.graph(self._frontend, handle=self._handle))
                tasks += [(one, Task(one.blueprint, name, alone=True)) for name in found]
        made = self._made([task for _, task in tasks])
        plans: dict[Wanted, dict[str, Plan]] = {one: {} for one, _ in tasks}
        for (one, task), plan in zip(tasks, made, strict=True):
            if isinstance(plan, Plan):
                plans[one][task.kernel] = plan
        for one, built in plans.items():
            self._fastest[one.family] = self._measure(one, built)
            self._cache.put(self._key(one), self._fastest[one.family].encode())

    def _key(self, one: Wanted) -> str:
        """Of the fastest kernel of a family."""
        return self._builds.key("fastest", one.family, one.blueprint)

    def _made(self, tasks: Sequence[Task]) -> list[Plan | NoPlanError]:
        if self._readable:
            try:
                return [one if isinstance(one, NoPlanError) else self._load(one) for one in self._builds(tasks)]
            except (RuntimeError, self._frontend.cudnnGraphNotSupportedError) as error:
                log.warning("cuDNN: plans cannot be loaded here (%s): building them one after another", error)
                self._readable = False
        return [self._build(task) for task in tasks]

    def _load(self, built: Built) -> Plan:
        graph = self._frontend.pygraph(handle=self._handle)
        graph.deserialize(self._handle, list(built.plan))
        return Plan(graph, None)

    def _build(self, task: Task) -> Plan | NoPlanError:
        try:
            graph = task.blueprint.graph(self._frontend, handle=self._handle)
            found = kernels(self._frontend, graph)
            return Plan(graph, found[build_first(graph, found, task.kernel, task.alone)])
        except NoPlanError as error:
            return error

    def _measure(self, one: Wanted, plans: Mapping[str, Plan]) -> str:
        """The name of the fastest kernel that agrees with the first one; of that one where none runs."""
        if one.tensors is None or not plans:
            raise NoPlanError(f"cuDNN has plans for {one.family} and can build none of them")
        result, first, seconds, expected = one.tensors[one.result], next(iter(plans)), dict[str, float](), None
        for name, plan in plans.items():
            with contextlib.suppress(RuntimeError):  # it is one of many
                taken = self._seconds(plan, one.tensors)
                expected = result.float() if expected is None else expected
                if (apart := relative_error(result.float(), expected)) < AGREE:
                    seconds[name] = taken
                else:
                    log.warning("cuDNN, %s: %s is wrong: %.3g off %s", one.family, name, apart, first)
        best = min(seconds, key=lambda name: seconds[name], default=first)
        told = [name for name in dict.fromkeys((best, first)) if name in seconds]
        times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in told)
        log.info("cuDNN, %s: %s of %d kernels (%s)", one.family, best, len(seconds), times)
        return best

    def _seconds(self, plan: Plan, tensors: Tensors) -> float:
        """The median of some runs after one that loads the kernel."""
        timer, events = DeviceTimer(next(iter(tensors.values())).device.type), []
        for _ in range(RUNS + 1):
            begin = timer.record()
            self._execute(plan, tensors)
            events.append((begin, timer.record()))
        return statistics.median([timer.seconds(*pair) for pair in events][1:])


def relative_error(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference as a share of the norm; infinite where a number is none."""
    apart = ((got - expected).norm() / expected.norm()).item()
    return apart if math.isfinite(apart) else math.inf
