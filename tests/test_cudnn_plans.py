# SPDX-License-Identifier: Apache-2.0
"""cuDNN has plans for all that the fused engine asks of it in FP8, from Hopper on."""

from __future__ import annotations

import shutil

import pytest

from tests.cudnn_plans import plans


@pytest.mark.parametrize(("capability", "missing"), [(890, {"attention"}), (900, set()), (1000, set())])
def test_cudnn_has_a_plan_for_every_size(capability: int, missing: set[str]) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("cuDNN cannot be asked here: no gcc")
    try:
        found = plans(capability)
    except RuntimeError as reason:
        pytest.skip(f"cuDNN cannot be asked here: {reason}")
    assert len(found) == 8 + 30
    without = {name for name, names in found.items() if names.startswith("none")}
    assert without == {name for name in found if name.split(",")[0] in missing}
