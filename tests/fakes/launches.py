# SPDX-License-Identifier: Apache-2.0
"""Counts kernel launches and the bytes that kernels read and write, at full size, without a device.

Tensors are on `meta`, so nothing is computed; Triton kernels are counted instead of launched. Every tensor that a
kernel reads or writes counts with all its bytes, as without a cache. PyTorch's convolutions add their bias in a
separate kernel; attention is one kernel.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
CHANGED: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "_residual_norm_kernel": lambda given: () if given["update_ptr"] is None else ("x_ptr",),
    "_norm_silu_kernel": lambda given: ("x_ptr",) if given["KEEP"] else (),
}
"""Arguments that one of our kernels both reads and writes."""


@dataclasses.dataclass
class Work:
    """Kernel launches and the bytes they move."""

    launches: int = 0
    bytes: int = 0

    def add(self, tensors: Iterable[object], launches: int = 1) -> None:
        self.launches += launches
        self.bytes += sum(_size(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor; expanded dimensions do not count."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class _Operations(TorchDispatchMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        writes = any(argument.is_write for argument in func._schema.arguments)
        memory = {tensor.untyped_storage()._cdata for tensor in given if isinstance(tensor, Tensor)}
        is_view = not writes and all(tensor.untyped_storage()._cdata in memory for tensor in made)
        if name in NO_KERNEL or is_view or not all(tensor.is_meta for tensor in made):
            return out
        if writes and name in ("copy_", "fill_", "zero_"):  # these do not read their target
            made = []
        self._work.add([*given, *made])
        if name == "convolution" and args[2] is not None:
            self._work.add([*made, *made])
        return out


class _Attention(TorchFunctionMode):
    def __init__(self, work: Work) -> None:
        super().__init__()
        self._work = work

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        out = torch.empty_like(q)  # with the layout of the queries
        self._work.add([q, k, v, out])
        return out


@contextlib.contextmanager
def counted() -> Iterator[Work]:
    """Count the work of all operations in the context."""
    work = Work()

    def launch(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        changed = CHANGED[kernel.__name__](given) if kernel.__name__ in CHANGED else ()
        work.add([*given.values(), *(given[name] for name in changed)])

    def launch_tuned(kernel: Autotuner, *args: Any, **kwargs: Any) -> None:
        launch(kernel.fn, *args, **kwargs)

    patches = mock.patch.object(JITFunction, "run", launch), mock.patch.object(Autotuner, "run", launch_tuned)
    with patches[0], patches[1], _Attention(work), _Operations(work):
        yield work
