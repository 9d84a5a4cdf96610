# SPDX-License-Identifier: Apache-2.0
"""Runs functions of tensors as CUDA graphs: the host launches hundreds of kernels at once.

Used by the fused backend. A graph runs on the addresses it was captured with, so each call copies its inputs to static
tensors, unless they already hold the same input.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from longlive_serve.backends.start_up import CAPTURE, phase

Function = Callable[[Sequence[Tensor]], Tensor | None]


class PerThread(threading.local):
    """Thread-local state."""

    def __init__(self) -> None:
        self.compiled: set[Hashable] = set()


class CudaGraphs:
    """Runs functions as CUDA graphs, one per key and slot. On a device without CUDA it calls them directly."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._per_thread = PerThread()
        self._static_inputs: dict[tuple[int, torch.Size], Tensor] = {}
        self._last_inputs: dict[tuple[int, torch.Size], Tensor] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream() if self.enabled else None
        """For capture; graphs run on the current stream."""

    def __call__(
        self, key: Hashable, slot: Hashable, function: Function, inputs: Sequence[Tensor], num_persistent: int = 0
    ) -> Tensor | None:
        """Returns `function(inputs)` as a tensor of the caller's own.

        `key` identifies what the function computes, including the inputs' shapes; `slot` identifies its other tensors.
        The first call of a key in a thread runs eagerly: libraries initialize their per-thread state, and kernels are
        compiled. The next call for each slot captures a graph.
        The last `num_persistent` inputs are never modified in place: they are copied only if they are other tensors.
        """
        if not self.enabled:
            return function(inputs)
        static_inputs = self._copy_inputs(inputs, num_persistent)
        if (key, slot) not in self._graphs and key not in self._per_thread.compiled:
            self._per_thread.compiled.add(key)
            return function(static_inputs)
        if (key, slot) not in self._graphs:
            self._graphs[key, slot] = self._capture(function, static_inputs)
        graph, out = self._graphs[key, slot]
        graph.replay()
        return None if out is None else out.clone()  # the next replay of any graph may overwrite it

    def prepare(
        self, key: Hashable, slot: Hashable, function: Function, inputs: Sequence[Tensor], num_persistent: int = 0
    ) -> None:
        """Capture the graph for later calls of a key that has been called before; nothing is computed."""
        if self.enabled and (key, slot) not in self._graphs:
            self._graphs[key, slot] = self._capture(function, self._copy_inputs(inputs, num_persistent))

    def _copy_inputs(self, inputs: Sequence[Tensor], num_persistent: int) -> list[Tensor]:
        first_persistent = len(inputs) - num_persistent
        return [self._copy_input(number, tensor, number >= first_persistent) for number, tensor in enumerate(inputs)]

    def _copy_input(self, number: int, tensor: Tensor, is_persistent: bool) -> Tensor:
        """The static tensor of input `number` for this shape, filled with the values of `tensor`."""
        key = number, tensor.shape
        if key not in self._static_inputs:
            self._static_inputs[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if not is_persistent or self._last_inputs.get(key) is not tensor:
            self._static_inputs[key].copy_(tensor)
        if is_persistent:
            self._last_inputs[key] = tensor  # a reference, so that no new tensor gets its identity
        return self._static_inputs[key]

    @phase(CAPTURE)
    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        """All graphs share one memory pool, as they run one after another.

        `torch.cuda.graph` is not used: it collects garbage and frees cached memory, which would delay live sessions.
        """
        assert self._stream is not None
        current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = function(inputs)
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph, out
