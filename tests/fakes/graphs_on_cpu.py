# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU: a capture records every PyTorch operation and every kernel, a replay does them again on
the same memory.

It holds what a real graph holds: tensors by their place, numbers by their value, nothing of Python's. So whatever the
host decides anew in a call, or copies to another place, is missed by a replay here as it is there; and what waits for
the device while capturing is an error, as it is there. How fast it is, and what runs beside what, is not shown.
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
    """Records operations as they are done, and undoes what they wrote: a capture changes nothing."""

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
            raise RuntimeError(f"{func}: waits for the device while a graph is captured")
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
    """In place of torch.cuda.CUDAGraph."""

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
    """CudaGraphs that are made within capture and replay, on the CPU."""
    Graph.captured = Graph.replayed = 0
    launch = InterpretedFunction.run

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not current:
            return launch(self, *args, **kwargs)
        recorder = current[-1].recorder
        with _disable_current_modes():  # the interpreter uses PyTorch itself
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
