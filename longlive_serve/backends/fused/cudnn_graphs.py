# SPDX-License-Identifier: Apache-2.0
"""Graphs of cuDNN by its frontend: how they are described, and which kernels there are for one.

Used by what builds plans and by what runs them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Tensors = Mapping[Any, Tensor]
"""The tensors of a graph by their numbers in it."""
Make = Callable[..., Any]
"""A function of a module: the frontend, tensors and `handle=` (or `device_property=`, of a device that need not be
here) -> a graph."""
KERNEL_CONFIG_IDS = range(64)
"""Numbers that cuDNN 9 gives the kernels of one backend; few of them exist for a graph."""


class NoPlanError(RuntimeError):
    """cuDNN cannot do this on this GPU."""


class GraphSpec(NamedTuple):
    """A graph by what it is made of, for any process."""

    make: Make
    tensors: tuple[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    """Number, shape, stride and dtype."""

    @classmethod
    def of(cls, make: Make, tensors: Tensors) -> GraphSpec:
        tensor_specs = ((int(number), (*x.shape,), x.stride(), x.dtype) for number, x in tensors.items())
        return cls(make, tuple(tensor_specs))

    def __str__(self) -> str:
        return f"{self.make.__module__}.{self.make.__qualname__} {self.tensors}"

    def graph(self, cudnn: Any, **kwargs: Any) -> Any:
        """Ready for plans. `kwargs`: as `Make` has it. Raises NoPlanError."""
        tensors = {
            number: torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for number, shape, stride, dtype in self.tensors
        }
        graph = self.make(cudnn, tensors, **kwargs)
        try:
            graph.validate()
            graph.build_operation_graph()
        except cudnn.cudnnGraphNotSupportedError as error:
            raise NoPlanError(f"cuDNN has no plan for this here: {error}") from None
        return graph


def fp8_graph(cudnn: Any, **kwargs: Any) -> Any:
    """An empty graph whose sums are float32. `kwargs`: as `Make` has it."""
    float32 = cudnn.data_type.FLOAT
    return cudnn.pygraph(
        io_data_type=cudnn.data_type.FP8_E4M3, intermediate_data_type=float32, compute_data_type=float32, **kwargs
    )


def kernels(cudnn: Any, graph: Any, config_ids: Iterable[int] = KERNEL_CONFIG_IDS) -> dict[str, int]:
    """Plans of such a graph by name: in cuDNN's own order, then other kernels of the backend that it puts first.

    That order knows little of FP8 convolutions: it begins with the smallest tile, whatever the size. Nothing is built.
    Raises NoPlanError.
    """
    try:
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise NoPlanError(f"cuDNN has no plan for this here: {error}") from None
    first = re.match(r"eng(\d+)", graph.get_plan_name_at_index(0))
    assert first is not None, graph.get_plan_name_at_index(0)
    for config_id in config_ids:
        with contextlib.suppress(cudnn.cudnnGraphNotSupportedError, RuntimeError):  # most of them do not exist
            graph.create_execution_plan(int(first[1]), {cudnn.knob_type.KERNEL_CFG: config_id})
    names = [graph.get_plan_name_at_index(index) for index in range(graph.get_execution_plan_count())]
    return {name: names.index(name) for name in dict.fromkeys(names)}


def build_first(graph: Any, found: Mapping[str, int], kernel: str, exact: bool = False) -> str:
    """Build the plan of `kernel`, or else, unless `exact`, the first of the others that builds; which it was.

    Raises NoPlanError.
    """
    for name in sorted(found, key=lambda name: name != kernel):
        if exact and name != kernel:
            break
        try:
            graph.build_plan_at_index(found[name])
        except Exception as error:  # the frontend has kinds of its own, also for kernels that do not compile
            log.debug("cuDNN: %s: %s", name, error)
        else:
            return name
    raise NoPlanError(f"cuDNN has {len(found)} plans for this here, and none can be built")


def data_type(cudnn: Any, tensor: Tensor) -> Any:
    """What the frontend calls the tensor's dtype."""
    names = {
        torch.float8_e4m3fn: "FP8_E4M3",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "HALF",
        torch.float32: "FLOAT",
    }
    return getattr(cudnn.data_type, names[tensor.dtype])
