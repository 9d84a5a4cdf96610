# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for an H200: the interpreter runs what no GPU would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, "-m", "tests.hopper_on_cpu"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_kernel_compiles_and_none_spills_registers(compiled: list[str]) -> None:
    names = {line.split(":")[0] for line in compiled}
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "longlive_serve/kernels").glob("*.py"))
    assert names == set(re.findall(r"def (_\w+_kernel)\(", sources))
    assert [line for line in compiled if " 0 stack" not in line] == []


def test_attention_multiplies_with_hoppers_instructions_for_groups_of_warps(compiled: list[str]) -> None:
    products = [line.split("shared ")[1] for line in compiled if line.startswith("_attention")]
    bfloat16, fp8 = "HGMMA.64x128x16.F32.BF16", "QGMMA.64x128x32.F32.E4M3.E4M3"
    assert products == [bfloat16, bfloat16, fp8]
