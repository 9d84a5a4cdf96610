# SPDX-License-Identifier: Apache-2.0
"""cuDNN by its own graphs: what PyTorch, which brings the library, has no way to ask it for.

Used by the fused engine for products in FP8. It takes the package `nvidia-cudnn-frontend`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longlive_serve.engines.clock import Clock

log = logging.getLogger(__name__)

Tensors = Mapping[Any, Tensor]
"""The tensors of a graph by their numbers in it."""
Make = Callable[..., Any]
"""The frontend, tensors and `handle=` (or `device_property=`, of a device that need not be here) -> a graph."""
CONFIGURATIONS = range(64)
"""Numbers that cuDNN 9 gives the kernels of one engine; few of them exist for a graph."""
RUNS = 5
AGREE = 0.05
"""Of two kernels' results: the norm of the difference as a share of the norm. Many are off by FP8's own rounding."""


class NoPlanError(RuntimeError):
    """cuDNN cannot do this on this GPU."""


class Plan(NamedTuple):
    graph: Any
    number: int
    """Which of the graph's."""


class Cudnn:
    """Runs graphs on this thread's current stream. A plan is made for each size of the tensors as they come: run a
    size once before a CUDA graph is captured."""

    def __init__(self) -> None:
        """Raises ImportError without the package."""
        import cudnn

        self._frontend, self._handle = cudnn, cudnn.create_handle()
        self._plans: dict[object, Plan] = {}
        self._fastest: dict[str, str] = {}
        """Names of kernels by family."""

    def __call__(self, make: Make, tensors: Tensors, result: int, family: str) -> None:
        """`result`: the number of the tensor that is written. `family`: sizes that share the kernel that is the
        fastest for the first of them.

        Raises NoPlanError.
        """
        key = make, *((number, tensor.shape, tensor.stride()) for number, tensor in tensors.items())
        if key not in self._plans:
            self._plans[key] = self._plan(make, tensors, result, family)
        self._execute(self._plans[key], tensors)

    def _execute(self, plan: Plan, tensors: Tensors) -> None:
        graph, index = plan
        size = max(1, graph.get_workspace_size_plan_at_index(index))
        workspace = torch.empty(size, dtype=torch.uint8, device=next(iter(tensors.values())).device)
        self._frontend.set_stream(self._handle, torch.cuda.current_stream().cuda_stream)
        pointers = {int(number): tensor.data_ptr() for number, tensor in tensors.items()}
        graph.execute_plan_at_index(pointers, workspace.data_ptr(), index, handle=self._handle)

    def _plan(self, make: Make, tensors: Tensors, result: int, family: str) -> Plan:
        graph = make(self._frontend, tensors, handle=self._handle)
        try:
            graph.validate()
            graph.build_operation_graph()
            found = kernels(self._frontend, graph)
        except self._frontend.cudnnGraphNotSupportedError as error:
            raise NoPlanError(f"cuDNN has no plan for this here: {error}") from None
        if family not in self._fastest:
            self._fastest[family] = self._measure(graph, found, tensors, tensors[result], family)
        fastest = self._fastest[family]
        for name in sorted(found, key=lambda name: name != fastest):  # should a size lack it, in cuDNN's own order
            if _builds(graph, found[name]):
                return Plan(graph, found[name])
        raise NoPlanError(f"cuDNN has plans for {family} and can build none of them")

    def _measure(self, graph: Any, found: Mapping[str, int], tensors: Tensors, result: Tensor, family: str) -> str:
        """The name of the fastest kernel that agrees with the first one; of that one where none runs."""
        first, seconds, expected = next(iter(found)), dict[str, float](), None
        for name, index in found.items():
            if not _builds(graph, index):
                continue
            with contextlib.suppress(RuntimeError):  # it is one of many
                taken = self._seconds(Plan(graph, index), tensors)
                expected = result.float() if expected is None else expected
                if (apart := _apart(result.float(), expected)) < AGREE:
                    seconds[name] = taken
                else:
                    log.warning("cuDNN, %s: %s is wrong: %.3g off %s", family, name, apart, first)
        best = min(seconds, key=lambda name: seconds[name], default=first)
        told = [name for name in dict.fromkeys((best, first)) if name in seconds]
        times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in told)
        log.info("cuDNN, %s: %s of %d kernels (%s)", family, best, len(seconds), times)
        return best

    def _seconds(self, plan: Plan, tensors: Tensors) -> float:
        """The median of some runs after one that loads the kernel."""
        clock, marks = Clock(next(iter(tensors.values())).device.type), []
        for _ in range(RUNS + 1):
            begin = clock.mark()
            self._execute(plan, tensors)
            marks.append((begin, clock.mark()))
        return statistics.median([clock.seconds(*pair) for pair in marks][1:])


def fp8_graph(cudnn: Any, **where: Any) -> Any:
    """An empty graph whose sums are float32. `where`: as `Make` has it."""
    wide = cudnn.data_type.FLOAT
    return cudnn.pygraph(
        io_data_type=cudnn.data_type.FP8_E4M3, intermediate_data_type=wide, compute_data_type=wide, **where
    )


def kernels(cudnn: Any, graph: Any, numbers: Iterable[int] = CONFIGURATIONS) -> dict[str, int]:
    """Plans of a validated graph by name: in cuDNN's own order, then other kernels of the engine that it puts first.

    That order knows little of FP8 convolutions: it begins with the smallest tile, whatever the size. Nothing is built.
    """
    graph.create_execution_plans([cudnn.heur_mode.A])
    graph.check_support()
    first = re.match(r"eng(\d+)", graph.get_plan_name_at_index(0))
    assert first is not None, graph.get_plan_name_at_index(0)
    for number in numbers:
        with contextlib.suppress(cudnn.cudnnGraphNotSupportedError, RuntimeError):  # most of them do not exist
            graph.create_execution_plan(int(first[1]), {cudnn.knob_type.KERNEL_CFG: number})
    names = [graph.get_plan_name_at_index(index) for index in range(graph.get_execution_plan_count())]
    return {name: names.index(name) for name in dict.fromkeys(names)}


def _apart(got: Tensor, expected: Tensor) -> float:
    """Infinite where a number is none."""
    apart = ((got - expected).norm() / expected.norm()).item()
    return apart if math.isfinite(apart) else math.inf


def _builds(graph: Any, index: int) -> bool:
    try:
        graph.build_plan_at_index(index)
    except Exception as error:  # the frontend has kinds of its own, also for kernels that do not compile
        log.debug("cuDNN: %s: %s", graph.get_plan_name_at_index(index), error)
        return False
    return True


def data_type(cudnn: Any, tensor: Tensor) -> Any:
    """What the frontend calls the tensor's dtype."""
    names = {
        torch.float8_e4m3fn: "FP8_E4M3",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "HALF",
        torch.float32: "FLOAT",
    }
    return getattr(cudnn.data_type, names[tensor.dtype])
