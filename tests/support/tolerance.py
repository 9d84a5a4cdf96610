# SPDX-License-Identifier: Apache-2.0
"""How far a result may be off, for a reason that holds on every processor.

Processors add in different orders, and every order rounds differently; so a difference that was seen on one of them is
no bound. What holds on all of them:

* A float64 run of the same (`Float64`) is the same everywhere, to nine digits or more. Files of the reference's results
  are the same everywhere as well. So their distance is a fact about the file: `GOLDEN` bounds it.
* What float32's rounding does to a result here is measured here: another float32 result of the same may be `TIMES` as
  far from float64's (`longlive_serve.backends.float64` says why).
* A sum of n products errs, relative to the sum of their sizes, by more than `gamma(n)` once in 10 000 or so at worst
  (Higham and Mary 2019, "A new approach to probabilistic rounding error analysis"), whatever its order.
* Sums of small integers have no rounding at all.
* Rounding to 8 bits errs by as much on either side of a tie. So how far a quantized result is from the plain one hardly
  depends on the order of sums, least of all in norms, which thousands of roundings make up. How far two quantized
  results of the same are from each other does, wherever something behind a tie magnifies it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_serve.backends.float64 import TIMES, Float64, error, max_error

__all__ = ["TIMES", "Float64", "assert_as_near", "assert_reference", "error", "gamma", "max_error", "whole_numbers"]

GOLDEN = 2e-6
"""The largest error of the reference's float32 results. A mistake is larger: the least that comes to mind, an eps of
1e-5 instead of 1e-6 in the DiT's norms, comes to 9e-6."""


def gamma(terms: int, dtype: torch.dtype = torch.float32) -> float:
    return float(4 * terms**0.5 * torch.finfo(dtype).eps / 2)


def whole_numbers(*shape: int, largest: int = 4) -> Tensor:
    """From -largest to largest: the sum of a million products of those as large as 4 has no rounding in float32."""
    return torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(0)).float()


def assert_as_near(got: Tensor | None, reference: Tensor, exact: Tensor) -> None:
    """`got` is as near to the float64 result as the float32 result of another computation of the same."""
    assert got is not None
    assert got.dtype == torch.float32
    assert exact.dtype == torch.float64
    off, allowed = error(got, exact), max_error(reference, exact)
    assert off <= allowed, f"error {off:.2e} of the largest value, {allowed / TIMES:.2e} has the other result"


def assert_reference(got: Tensor | None, golden: Tensor, exact: Tensor) -> None:
    """What we compute in float64 is what the reference rounded, and in float32 we round no worse."""
    assert error(golden, exact) <= GOLDEN, "other than the reference"
    assert_as_near(got, golden, exact)
