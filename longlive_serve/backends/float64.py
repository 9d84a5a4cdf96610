# SPDX-License-Identifier: Apache-2.0
"""A model's result without the rounding of float32, and how far another result may be from it.

Every float32 result depends on the processor: its libraries add in another order on another one, and the models
magnify what that changes. A float64 run of the same is the same everywhere, but for the ninth digit or so. Called where
two computations are compared: by the replay of a case, by the export, by tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TIMES = 16
"""How many times the error of one float32 result another one of the same may have.

A sum of n products in the worst order, one after the other, errs about sqrt(n / log2(n)) times as much as in the best,
by halves: 12 times for the widest of the models' layers that are checked in float32, which have up to 1536 inputs.
The rest is for the largest of many errors, which varies.
"""
LEAST = TIMES * torch.finfo(torch.float32).eps
"""What a float32 result may be off in any case."""


class Float64(TorchFunctionMode):
    """Within it PyTorch computes in float64 what it is told to compute in float32, whatever the models convert to.

    Weights are converted where they are used, so that a model is never there twice. What is written in place keeps
    its dtype: a cache that is to hold float64 must be made of it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if in_place or name == "__get__":
            return func(*args, **(kwargs or {}))
        if func is Tensor.float:
            func = Tensor.double
        return func(*_to_float64(args), **_to_float64(kwargs or {}))


def _to_float64(value: Any) -> Any:
    """Arguments with float64 in the place of float32, tensors and dtypes."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, Mapping):
        return {name: _to_float64(item) for name, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(_to_float64, value))
    return torch.float64 if value is torch.float32 else value


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    assert actual.shape == exact.shape, f"got {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.double(), exact.double()
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def max_error(reference: Tensor, exact: Tensor) -> float:
    """How far a float32 result may be from the exact one, by how far another, the reference, is.

    Not less than for the rounding of the result and of its inputs: a reference may be exact by chance.
    """
    return max(TIMES * error(reference, exact), LEAST)
