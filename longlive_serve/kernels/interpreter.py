# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter with the casts and products of bfloat16 and FP8 that a GPU has.

By itself (Triton 3.6 and 3.7) it truncates float32 to bfloat16, multiplies bfloat16 matrices as the integers that their
bits are, and loses the carry when it rounds to FP8: 1.97 becomes 1. It also looks through its own modules for builtins
at every launch, and at every call of one kernel function by another, which takes a third of the time.
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
"""Each float type of Triton's: in torch, and in NumPy or the integers that stand for it there."""


def convert(data: np.ndarray[Any, Any], source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray[Any, Any]:
    """Numbers of one type as the bits of another, rounded to the nearest and ties to even."""
    (dtype, stored), (wanted, _) = TYPES[source.name], TYPES[target.name]
    numbers = torch.from_numpy(np.array(data).view(stored)).view(dtype)
    bits = numbers.to(wanted).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[wanted.itemsize])
    return bits.numpy().view(f"u{wanted.itemsize}").reshape(data.shape)


def dot(_: Any, a: Any, b: Any, total: Any, *_options: Any) -> interpreter.TensorHandle:
    """a b + total with float32 sums."""

    def wide(x: Any) -> np.ndarray[Any, Any]:
        small = x.dtype.scalar.name in ("bf16", "fp8e4nv")
        return convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) if small else x.data

    return interpreter.TensorHandle(np.matmul(wide(a), wide(b), dtype=np.float32) + total.data, total.dtype.scalar)


@functools.cache
def builtins_of(module: Any) -> list[tuple[str, Any]]:
    return [(name, member) for name, member in inspect.getmembers(module) if tl.core.is_builtin(member)]


def patch_builtins(module: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, but each module is looked through once: before anything in it is replaced."""
    found = builtins_of(module)
    replaced = any(getattr(module, name) is not member for name, member in found[:1])  # a kernel function calls another
    for name, member in () if replaced else found:
        interpreter._patch_attr(module, name, member, builder, scope)


def compute_like_a_gpu() -> None:
    """For all kernels that this process runs in the interpreter."""
    interpreter._patch_builtin = patch_builtins
    interpreter._convert_float = convert
    interpreter.InterpreterBuilder.create_dot = dot
