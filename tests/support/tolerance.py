# SPDX-License-Identifier: Apache-2.0
"""Numerical tolerances that hold on every processor.

Processors add in different orders, and every order rounds differently, so a difference measured on one processor is not
a bound. Processor-independent bounds:

* A float64 run (`Float64`) is the same everywhere, to nine digits or more, and so are the reference's result files.
  Their distance is a property of the file; `GOLDEN` bounds it.
* The effect of float32 rounding is measured on this machine: another float32 result may be `TIMES` as far from the
  float64 result (`longlive_serve.backends.float64` explains why).
* The error of a sum of n products, relative to the sum of their magnitudes, exceeds `gamma(n)` with a probability of
  about 1e-4 at most, in any order (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis").
* Sums of small integers are exact.
* 8-bit rounding has the same error on both sides of a tie. So the distance of a quantized result to the unquantized one
  hardly depends on the order of sums, least of all in norms over thousands of values. The distance of two quantized
  results does depend on it, if later layers amplify a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_serve.backends.float64 import TIMES, Float64, error, max_error

__all__ = ["TIMES", "Float64", "assert_as_near", "assert_reference", "error", "gamma", "max_error", "whole_numbers"]

GOLDEN = 2e-6
"""Maximum error of the reference's float32 results. Real mistakes are larger: even an eps of 1e-5 instead of 1e-6 in
the DiT's norms causes 9e-6."""


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    return float(4 * terms**0.5 * torch.finfo(dtype).eps / 2)


def whole_numbers(*shape: int, largest: int = 4) -> Tensor:
    """Integers from -largest to largest. With 4, sums of up to a million products are exact in float32."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(0)).float()


def assert_as_near(got: Tensor | None, reference: Tensor, exact: Tensor) -> None:
    """Check that `got` is as close to the float64 result `exact` as `reference`, another float32 result."""
    assert got is not None
    assert got.dtype == torch.float32
    assert exact.dtype == torch.float64
    off, allowed = error(got, exact), max_error(reference, exact)
    assert off <= allowed, f"relative error: got {off:.2e}, expected at most {allowed:.2e}"


def assert_reference(got: Tensor | None, golden: Tensor, exact: Tensor) -> None:
    """Check the golden result against float64, and `got` against both."""
    assert error(golden, exact) <= GOLDEN, "the float64 result differs from the reference"
    assert_as_near(got, golden, exact)
