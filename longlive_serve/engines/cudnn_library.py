# SPDX-License-Identifier: Apache-2.0
"""cuDNN by its own graphs: what PyTorch, which brings the library, has no way to ask it for.

Used by the fused engine for products in FP8. It takes the package `nvidia-cudnn-frontend`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[Any, Tensor]
"""The tensors of a graph by their numbers in it."""
Make = Callable[..., Any]
"""The frontend, tensors and `handle=` (or `device_property=`, of a device that need not be here) -> a graph."""


class Cudnn:
    """Runs graphs on this thread's current stream. A plan is made for each size of the tensors as they come: run a
    size once before a CUDA graph is captured."""

    def __init__(self) -> None:
        """Raises ImportError without the package."""
        import cudnn

        self._frontend, self._handle = cudnn, cudnn.create_handle()
        self._plans: dict[object, Any] = {}

    def __call__(self, make: Make, tensors: Tensors) -> None:
        """Raises RuntimeError where cuDNN has no plan for this."""
        key = make, *((number, tensor.shape, tensor.stride()) for number, tensor in tensors.items())
        graph = self._plans.get(key) or self._plan(make, tensors)
        self._plans[key] = graph
        device = next(iter(tensors.values())).device
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=device)
        self._frontend.set_stream(self._handle, torch.cuda.current_stream().cuda_stream)
        pointers = {int(number): tensor.data_ptr() for number, tensor in tensors.items()}
        graph.execute(pointers, workspace.data_ptr(), handle=self._handle)

    def _plan(self, make: Make, tensors: Tensors) -> Any:
        graph = make(self._frontend, tensors, handle=self._handle)
        try:
            graph.build([self._frontend.heur_mode.A, self._frontend.heur_mode.FALLBACK])
        except self._frontend.cudnnGraphNotSupportedError as error:
            raise RuntimeError(f"cuDNN has no plan for this here: {error}") from None
        return graph


def data_type(cudnn: Any, tensor: Tensor) -> Any:
    """What the frontend calls the tensor's dtype."""
    names = {
        torch.float8_e4m3fn: "FP8_E4M3",
        torch.bfloat16: "BFLOAT16",
        torch.float16: "HALF",
        torch.float32: "FLOAT",
    }
    return getattr(cudnn.data_type, names[tensor.dtype])
