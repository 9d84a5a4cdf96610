# SPDX-License-Identifier: Apache-2.0
"""Patches Triton's interpreter so that casts and matrix products of bfloat16 and FP8 give the results of a GPU.

Unpatched, Triton 3.6 and 3.7 truncate float32 to bfloat16, multiply bfloat16 matrices as integers of the same bits, and
lose the carry when rounding to FP8: 1.97 becomes 1. They also search their modules for builtins at every launch and at
every call between kernel functions, which takes a third of the time.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

TYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.int16),
    "fp8e4nv": (torch.float8_e4m3fn, np.int8),
}
"""Triton's float types: the torch dtype, and the NumPy dtype of the values or, if there is none, of their bits."""


def convert(data: np.ndarray[Any, Any], source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray[Any, Any]:
    """Convert numbers of one type to the bits of another, rounding to nearest, ties to even."""
    (dtype, stored), (wanted, _) = TYPES[source.name], TYPES[target.name]
    numbers = torch.from_numpy(np.array(data).view(stored)).view(dtype)
    bits = numbers.to(wanted).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[wanted.itemsize])
    return bits.numpy().view(f"u{wanted.itemsize}").reshape(data.shape)


def dot(_: Any, a: Any, b: Any, total: Any, *_options: Any) -> interpreter.TensorHandle:
    """a b + total, accumulated in float32."""

    def wide(x: Any) -> np.ndarray[Any, Any]:
        stored_as_bits = x.dtype.scalar.name in ("bf16", "fp8e4nv")
        return convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) if stored_as_bits else x.data

    return interpreter.TensorHandle(np.matmul(wide(a), wide(b), dtype=np.float32) + total.data, total.dtype.scalar)


@functools.cache
def builtins_of(module: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]


def patch_builtins(module: Any, builder: Any, scope: Any) -> None:
    """Like the interpreter's own function, but search each module only once, before any member is replaced."""
    found = builtins_of(module)
    replaced = any(getattr(module, name) is not member for name, member in found[:1])  # nested call
    for name, member in () if replaced else found:
        interpreter._patch_attr(module, name, member, builder, scope)


def compute_like_a_gpu() -> None:
    """Apply the patches to the interpreter of this process."""
    interpreter._patch_builtin = patch_builtins
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
