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


class OfThread(threading.local):
    """What each thread has of its own."""

    def __init__(self) -> None:
        self.compiled: set[Hashable] = set()


class CudaGraphs:
    """Runs functions as CUDA graphs, one for each key and place. On a device without CUDA they just run."""

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor | None]] = {}
        self._own = OfThread()
        self._places: dict[tuple[int, torch.Size], Tensor] = {}
        self._came: dict[tuple[int, torch.Size], Tensor] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if self.enabled else None
        self._stream = torch.cuda.Stream() if self.enabled else None
        """Graphs are captured there; they run on the current one."""

    def __call__(
        self, key: Hashable, place: Hashable, function: Function, inputs: Sequence[Tensor], lasting: int = 0
    ) -> Tensor | None:
        """`function` of `inputs`; its result is the caller's own.

        `key`: whatever decides what the function does, with the inputs' shapes. `place`: where its other tensors lie.
        The first call of a key in a thread runs as it is, as libraries prepare then what they keep for each thread, and
        kernels are compiled; later ones capture, once for each place.
        The last `lasting` inputs never change in place: they are copied only when others came in the call before.
        """
        if not self.enabled:
            return function(inputs)
        staged = self._staged(inputs, lasting)
        if (key, place) not in self._graphs and key not in self._own.compiled:
            self._own.compiled.add(key)
            return function(staged)
        if (key, place) not in self._graphs:
            self._graphs[key, place] = self._capture(function, staged)
        graph, out = self._graphs[key, place]
        graph.replay()
        return None if out is None else out.clone()  # the next replay of any graph writes where it lies

    def prepare(
        self, key: Hashable, place: Hashable, function: Function, inputs: Sequence[Tensor], lasting: int = 0
    ) -> None:
        """Capture what a later call will replay, for a key that has been called; nothing is computed."""
        if self.enabled and (key, place) not in self._graphs:
            self._graphs[key, place] = self._capture(function, self._staged(inputs, lasting))

    def _staged(self, inputs: Sequence[Tensor], lasting: int) -> list[Tensor]:
        first_lasting = len(inputs) - lasting
        return [self._stage(number, tensor, number >= first_lasting) for number, tensor in enumerate(inputs)]

    def _stage(self, number: int, tensor: Tensor, lasting: bool) -> Tensor:
        """Where input `number` lies in every call with this shape, with the tensor's values in it."""
        key = number, tensor.shape
        if key not in self._places:
            self._places[key] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        if not lasting or self._came.get(key) is not tensor:
            self._places[key].copy_(tensor)
        if lasting:
            self._came[key] = tensor  # held, so that no other one can be taken for it
        return self._places[key]

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
