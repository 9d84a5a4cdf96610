# SPDX-License-Identifier: Apache-2.0
"""Synchronous fakes of CUDA streams and graphs, for tests without a GPU.

They check the stream of each operation and the content of graphs, but not concurrency.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

GPU, CAPABILITY = "NVIDIA H200", (9, 0)


class Stream:
    """A CUDA stream that executes synchronously."""

    def __init__(self, device: Any = None) -> None:
        self.cuda_stream = id(self)

    def wait_stream(self, other: Stream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class CudaGraph:
    """Replays the work that was executed during the capture."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def replay(self) -> None:
        cuda.replayed += 1
        for execute in self.work:
            execute()


class Cuda:
    """The state of the fake, with counters."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.current = Stream()
        self.current.cuda_stream = 0  # the default one
        self.capturing: CudaGraph | None = None
        self.executed = self.captured = self.replayed = 0
        self.blocks: set[int] = set()
        """Addresses of activation memory."""
        self.fails = False
        """Make TensorRT calls fail."""

    def current_stream(self, device: Any = None) -> Stream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    @contextlib.contextmanager
    def graph(self, graph: CudaGraph, capture_error_mode: str) -> Iterator[None]:
        self.capturing = graph
        yield
        self.capturing, self.captured = None, self.captured + 1


cuda = Cuda()


@contextlib.contextmanager
def cuda_on_cpu() -> Iterator[Cuda]:
    """Make torch report a GPU and use the fake streams and graphs."""
    cuda.reset()
    stand_ins = {
        "is_available": lambda: True,
        "get_device_name": lambda device: GPU,
        "get_device_capability": lambda device: CAPABILITY,
        "Stream": Stream,
        "CUDAGraph": CudaGraph,
        "current_stream": cuda.current_stream,
        "stream": cuda.stream,
        "graph": cuda.graph,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, stand_in in stand_ins.items():
            patch.setattr(torch.cuda, name, stand_in)
        yield cuda
