# SPDX-License-Identifier: Apache-2.0
"""Helpers of the kernel tests. With TRITON_INTERPRET=0 on a GPU, they test the compiled kernels."""

from __future__ import annotations

import os

import torch
from torch import Tensor

DEVICE = "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest number wanted; shapes must agree."""
    assert got.shape == wanted.shape, f"{got.shape}, not {wanted.shape}"
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).abs().max() / wanted.abs().max())
