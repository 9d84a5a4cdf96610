# SPDX-License-Identifier: Apache-2.0
"""Describes cuDNN graphs for its frontend, and lists the kernels for a graph.

Used to build plans and to run them.
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
"""The tensors of a graph by uid."""
Make = Callable[..., Any]
"""A module-level function: (frontend, tensors, `handle=` or, without the device, `device_property=`) -> a graph."""
KERNEL_CONFIG_IDS = range(64)
"""Ids of the kernels of one cuDNN 9 engine; few of them exist for a given graph."""


class NoPlanError(RuntimeError):
    """cuDNN does not support this graph on this GPU."""


class GraphSpec(NamedTuple):
    """The description of a graph, which can be sent to another process."""

    make: Make
    tensors: tuple[tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype], ...]
    """Uid, shape, stride and dtype."""

    @classmethod
    def of(cls, make: Make, tensors: Tensors) -> GraphSpec:
        tensor_specs = ((int(number), (*x.shape,), x.stride(), x.dtype) for number, x in tensors.items())
        return cls(make, tuple(tensor_specs))

    def __str__(self) -> str:
        return f"{self.make.__module__}.{self.make.__qualname__} {self.tensors}"

    def graph(self, cudnn: Any, **kwargs: Any) -> Any:
        """Build the graph, without plans. `kwargs`: as for `Make`. Raises NoPlanError."""
        tensors = {
            number: torch.empty_strided(shape, stride, dtype=dtype, device="meta")
            for number, shape, stride, dtype in self.tensors
        }
        graph = self.make(cudnn, tensors, **kwargs)
        try:
            graph.validate()
            graph.build_operation_graph()
        except cudnn.cudnnGraphNotSupportedError as error:
            raise NoPlanError(f"cuDNN does not support this here: {error}") from None
        return graph


def fp8_graph(cudnn: Any, **kwargs: Any) -> Any:
    """An empty graph with float32 accumulation. `kwargs`: as for `Make`."""
    float32 = cudnn.data_type.FLOAT
    return cudnn.pygraph(
        io_data_type=cudnn.data_type.FP8_E4M3, intermediate_data_type=float32, compute_data_type=float32, **kwargs
    )


def kernels(cudnn: Any, graph: Any, config_ids: Iterable[int] = KERNEL_CONFIG_IDS) -> dict[str, int]:
    """Plan indices by kernel name: in cuDNN's heuristic order, then the other kernels of its first engine.

    The heuristics are poor for FP8 convolutions: they start with the smallest tile at every size. Nothing is built.
    Raises NoPlanError.
    """
    try:
        graph.create_execution_plans([cudnn.heur_mode.A])
        graph.check_support()
    except cudnn.cudnnGraphNotSupportedError as error:
        raise NoPlanError(f"cuDNN does not support this here: {error}") from None
    first = re.match(r"eng(\d+)", graph.get_plan_name_at_index(0))
    assert first is not None, graph.get_plan_name_at_index(0)
    for config_id in config_ids:
        with contextlib.suppress(cudnn.cudnnGraphNotSupportedError, RuntimeError):  # most of them do not exist
            graph.create_execution_plan(int(first[1]), {cudnn.knob_type.KERNEL_CFG: config_id})
    names = [graph.get_plan_name_at_index(index) for index in range(graph.get_execution_plan_count())]
    return {name: names.index(name) for name in dict.fromkeys(names)}


def build_first(graph: Any, found: Mapping[str, int], kernel: str, exact: bool = False) -> str:
    """Build the plan of `kernel` or, unless `exact`, the first other one that builds. Returns the kernel's name.

    Raises NoPlanError.
    """
    for name in sorted(found, key=lambda name: name != kernel):
        if exact and name != kernel:
            break
        try:
            graph.build_plan_at_index(found[name])
        except Exception as error:  # the frontend's own exceptions, also for compilation errors
            log.debug("cuDNN: %s: %s", name, error)
        else:
            return name
    raise NoPlanError(f"cuDNN has {len(found)} plans for this here, but none can be built")


def data_type(cudnn: Any, tensor: Tensor) -> Any:
    """The frontend's name of the tensor's dtype."""
    names = {
        torch.float8_e4m3fn: "FP8_E4M3",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "HALF",
        torch.float32: "FLOAT",
    }
    return getattr(cudnn.data_type, names[tensor.dtype])
