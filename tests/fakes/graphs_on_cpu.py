# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU: a capture records every PyTorch operation and every kernel; a replay repeats them on the
same memory.

Like a real graph, it stores tensors by address, numbers by value, and no Python state. So a replay repeats neither
decisions of the host nor copies to new addresses, and a synchronization during capture is an error. Speed and
concurrency are not simulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from longlive_serve.backends.fused.cuda_graph_runner import CudaGraphs

WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal")


class Recorder(TorchDispatchMode):
    """Records executed operations and undoes their writes, because a capture does not execute them."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Callable[[], None]] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def keep(self, written: Iterable[object]) -> None:
        for tensor in written:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def undo(self) -> None:
        for storage, before in self._before.values():
            storage.copy_(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{func}: synchronizes during a graph capture")
        with _disable_current_modes():
            written = zip(func._schema.arguments, args, strict=False)
            self.keep(leaf for argument, given in written if argument.is_write for leaf in tree_leaves(given))
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]

        def again() -> None:
            for old, new in zip(made, tree_leaves(func(*args, **(kwargs or {}))), strict=False):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)

        self.work.append(again)
        return out


class Graph:
    """Replaces torch.cuda.CUDAGraph."""

    captured = replayed = 0

    def __init__(self) -> None:
        self.recorder = Recorder()

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        Graph.captured += 1
        current.append(self)
        self.recorder.__enter__()

    def capture_end(self) -> None:
        current.remove(self)
        self.recorder.__exit__(None, None, None)
        self.recorder.undo()

    def replay(self) -> None:
        Graph.replayed += 1
        for do in self.recorder.work:
            do()


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: object) -> None:
        pass


current: list[Graph] = []


@contextlib.contextmanager
def graphs_on_cpu() -> Iterator[type[Graph]]:
    """Make new CudaGraphs capture and replay on the CPU."""
    Graph.captured = Graph.replayed = 0
    launch = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not current:
            return launch(self, *args, **kwargs)
        recorder = current[-1].recorder
        with _disable_current_modes():  # do not record the interpreter's own PyTorch operations
            recorder.keep(args)
            launch(self, *args, **kwargs)
        recorder.work.append(lambda: launch(self, *args, **kwargs))
        return None

    begin = CudaGraphs.__init__

    def enabled(self: CudaGraphs, device: torch.device) -> None:
        begin(self, device)
        self.enabled, self._pool, self._stream = True, (0, 0), Stream()  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        patch.setattr(CudaGraphs, "__init__", enabled)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "current_stream", Stream)
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        yield Graph
