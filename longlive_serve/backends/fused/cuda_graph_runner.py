# SPDX-License-Identifier: Apache-2.0
"""Functions of tensors as CUDA graphs: the host launches hundreds of kernels as one.

Used by the fused backend. A graph runs on the addresses that it was captured with, so inputs are copied to where they
lie in every call, unless they are there from the call before.
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
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.compiled: set[Hashable] = set()


class CudaGraphs:
    """Runs functions as CUDA graphs, one for each key and place. On a device without CUDA they just run."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._per_thread = PerThread()
        self._static_inputs: dict[tuple[int, torch.Size], Tensor] = {}
        self._last_inputs: dict[tuple[int, torch.Size], Tensor] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream() if self.enabled else None
        """Graphs are captured there; they run on the current one."""

    def __call__(
        self, key: Hashable, slot: Hashable, function: Function, inputs: Sequence[Tensor], num_persistent: int = 0
    ) -> Tensor | None:
        """`function` of `inputs`; its result is the caller's own.

        `key`: whatever decides what the function does, with the inputs' shapes. `slot`: where its other tensors lie.
        The first call of a key in a thread runs as it is, as libraries prepare then what they keep for each thread, and
        kernels are compiled; later ones capture, once for each place.
        The last `num_persistent` inputs never change in place: they are copied only if the call before had others.
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
        return None if out is None else out.clone()  # the next replay of any graph writes where it lies

    def prepare(
        self, key: Hashable, slot: Hashable, function: Function, inputs: Sequence[Tensor], num_persistent: int = 0
    ) -> None:
        """Capture what a later call will replay, for a key that has been called; nothing is computed."""
        if self.enabled and (key, slot) not in self._graphs:
            self._graphs[key, slot] = self._capture(function, self._copy_inputs(inputs, num_persistent))

    def _copy_inputs(self, inputs: Sequence[Tensor], num_persistent: int) -> list[Tensor]:
        first_persistent = len(inputs) - num_persistent
        return [self._copy_input(number, tensor, number >= first_persistent) for number, tensor in enumerate(inputs)]

    def _copy_input(self, number: int, tensor: Tensor, is_persistent: bool) -> Tensor:
        """Where input `number` lies in every call with this shape, with the tensor's values in it."""
        key = number, tensor.shape
        if key not in self._static_inputs:
            self._static_inputs[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if not is_persistent or self._last_inputs.get(key) is not tensor:
            self._static_inputs[key].copy_(tensor)
        if is_persistent:
            self._last_inputs[key] = tensor  # held, so that no other one can be taken for it
        return self._static_inputs[key]

    @phase(CAPTURE)
    def _capture(self, function: Function, inputs: Sequence[Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
        """All graphs share one pool of memory: they run one after another.

        Not by `torch.cuda.graph`, which collects garbage and gives cached memory back each time: sessions are live.
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
