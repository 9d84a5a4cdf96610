# SPDX-License-Identifier: Apache-2.0
"""Float64 reference results, and tolerances for float32 results compared with them.

Float32 results depend on the processor: libraries sum in a processor-specific order, and the models amplify the
differences. Float64 results agree everywhere to about nine digits. Used to compare two computations: by the replay of a
case, the export and tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TIMES = 16
"""Allowed ratio between the errors of two float32 results of the same computation.

The error of a sequential sum of n products is about sqrt(n / log2(n)) times that of a pairwise sum: 12 times for the
widest layers that are checked in float32, with up to 1536 inputs. The rest covers the variation of the maximum error.
"""
LEAST = TIMES * torch.finfo(torch.float32).eps
"""Minimum tolerance of a float32 result."""


class Float64(TorchFunctionMode):
    """Makes PyTorch compute in float64 wherever the models ask for float32.

    Weights are converted at each use, so the model is not held twice. Tensors written in place keep their dtype: a
    cache must be created in float64.
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
    """Arguments with float32 tensors and dtypes replaced by float64."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if isinstance(value, Mapping):
        return {name: _to_float64(item) for name, item in value.items()}
    if type(value) in {list, tuple}:
        return type(value)(map(_to_float64, value))
    return torch.float64 if value is torch.float32 else value


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference divided by the largest absolute value."""
    assert actual.shape == exact.shape, f"got {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.double(), exact.double()
    return ((actual - exact).abs().max() / exact.abs().max()).item()


def max_error(reference: Tensor, exact: Tensor) -> float:
    """The largest allowed error of a float32 result, from the error of another float32 result, the reference.

    At least `LEAST`, for the rounding of inputs and result: the reference may be exact by chance.
    """
    return max(TIMES * error(reference, exact), LEAST)
