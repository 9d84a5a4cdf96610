# SPDX-License-Identifier: Apache-2.0
"""cuDNN has plans for all that the fused backend asks of it in FP8, from Hopper on, and their kernels are Hopper's."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.project.cudnn_plans import BUILT, plans


def asked(capability: int, build: bool) -> dict[str, str]:
    if torch.version.cuda is not None:
        pytest.skip("needs PyTorch's build for the CPU: the stand-ins would take the place of what that for CUDA loads")
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc (Debian, Ubuntu: apt-get install gcc)")
    try:
        return plans(capability, build)
    except RuntimeError as reason:
        pytest.skip(f"needs NVIDIA's wheels of cuDNN, which pip fetches: {reason}")


@pytest.mark.parametrize(("capability", "missing"), [(890, {"attention"}), (1000, set())])
def test_other_gpus(capability: int, missing: set[str]) -> None:
    found = asked(capability, build=False)
    without = {name for name, names in found.items() if names.startswith("none")}
    assert without == {name for name in found if name.split(",")[0] in missing}


def test_an_h200_has_a_plan_for_every_size_and_multiplies_fp8_as_such() -> None:
    found = asked(900, build=True)
    kernels = [found.pop(f"kernel of {name}") for name in BUILT]
    assert "bytes" in found.pop("built beside")
    assert len(found) == 8 + 38
    assert not any(names.startswith("none") for names in found.values()), found
    assert len(found[BUILT[-1]].split(", ")) > 10  # of them its own order names two
    for products in kernels:
        assert all(product.startswith("QGMMA") and product.endswith(".E4M3.E4M3") for product in products.split())
        assert products
