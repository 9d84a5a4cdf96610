# SPDX-License-Identifier: Apache-2.0
"""Triton's kernels on the CPU: its interpreter, with the casts and products of bfloat16 and FP8 that a GPU has.

By itself (Triton 3.6 and 3.7) it truncates float32 to bfloat16, multiplies bfloat16 matrices as the integers that their
bits are, and loses the carry when it rounds to FP8: 1.97 becomes 1. Run with TRITON_INTERPRET=0 on a GPU, the tests of
kernels check the compiled ones there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"
TYPES = {
    "fp32": (torch.float32, np.float32),
    "fp16": (torch.float16, np.float16),
    "bf16": (torch.bfloat16, np.int16),
    "fp8e4nv": (torch.float8_e4m3fn, np.int8),
}
"""Each float type of Triton's: in torch, and in NumPy or the integers that stand for it there."""


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, _: Any) -> np.ndarray:
    """Numbers of one type as the bits of another, rounded to the nearest and ties to even."""
    (dtype, stored), (wanted, _) = TYPES[source.name], TYPES[target.name]
    numbers = torch.from_numpy(np.array(data).view(stored)).view(dtype)
    bits = numbers.to(wanted).view({1: torch.int8, 2: torch.int16, 4: torch.int32}[wanted.itemsize])
    return bits.numpy().view(f"u{wanted.itemsize}").reshape(data.shape)


def dot(_: Any, a: Any, b: Any, total: Any, *_options: Any) -> interpreter.TensorHandle:
    """a b + total with float32 sums."""

    def wide(x: Any) -> np.ndarray:
        small = x.dtype.scalar.name in ("bf16", "fp8e4nv")
        return convert(x.data, x.dtype.scalar, tl.float32, None).view(np.float32) if small else x.data

    return interpreter.TensorHandle(np.matmul(wide(a), wide(b), dtype=np.float32) + total.data, total.dtype.scalar)


@pytest.fixture(autouse=True)
def arithmetic_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For every test of a module that imports it. On a GPU nobody hears of an overflow in exp either."""
    monkeypatch.setattr(interpreter, "_convert_float", convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
    with np.errstate(over="ignore"):
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest number wanted; shapes must agree."""
    assert got.shape == wanted.shape, f"{got.shape}, not {wanted.shape}"
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())
