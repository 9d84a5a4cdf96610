# SPDX-License-Identifier: Apache-2.0
"""`python3 -m tests.project.gpu_check`: all steps run on the CPU, with the listed packages only."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.project import gpu_check
from tests.project.gpu_check import OUT_OF_TIME, Checks, main

ROOT = Path(__file__).parents[2]
BARE = """
import runpy, sys
for name in "ftfy av tritonclient matplotlib onnxruntime onnx grpc pytest hypothesis diffusers".split():
    sys.modules[name] = None
runpy.run_module("tests.project.gpu_check", run_name="__main__", alter_sys=True)
"""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", BARE, "--toy", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_every_step_runs(tmp_path: Path) -> None:
    path = tmp_path / "new/check.json"
    done = run("--json", str(path), "--seconds", "600")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["command"].startswith("python -m tests.project.gpu_check --toy --json")
    steps = record["steps"]
    assert list(steps) == [name for name, _ in Checks(toy=True).steps()]
    assert len(steps) == 9
    rollouts = steps["golden rollouts"]["found"]
    assert len(rollouts) == 4
    assert all(0 < off < gpu_check.PRECISIONS[name.split(", ")[1]] / 3 for name, off in rollouts.items())
    for row, most in (("fused", 1e-4), ("fused all fp8", 0.2)):
        video = steps[f"full size: {row}"]["found"]
        assert video["same_twice"]
        assert 0 < max(video["latents_off"]) < most
    assert len(steps["attention"]["found"]) == 8
    assert steps["attention"]["found"]["18 to 72"]["triton"]["error"] < 1e-5
    assert steps["products"]["found"]["qkv"]["seconds"]["fp8"] > 0
    assert all(one["seconds"] > 0 for one in steps["kernels of rows"]["found"].values())
    assert len(steps["convolutions"]["found"]) == 3
    profile = steps["a chunk's kernels"]["found"]
    assert profile["launches"] > 100
    assert profile["longest"][0]["seconds"] >= profile["longest"][1]["seconds"] > 0


def test_at_the_deadline_it_ends_with_what_it_has(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    done = run("--json", str(path), "--seconds", "0.5")
    assert done.returncode == OUT_OF_TIME, done.stdout + done.stderr
    assert "stopped after 0.5 s; the results so far are saved" in done.stderr
    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["complete"], record["steps"]) == (False, {})


def test_a_step_that_fails_leaves_its_reason_and_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ArithmeticError("other numbers")

    def steps(self: Checks) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from (("first", time.monotonic), ("second", broken), ("third", lambda: {"a": 1}))

    monkeypatch.setattr(Checks, "steps", steps)
    path = tmp_path / "check.json"
    assert main(["--toy", "--json", str(path)]) == 1
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["complete"]
    assert record["steps"]["third"]["found"] == {"a": 1}
    assert "ArithmeticError: other numbers" in record["steps"]["second"]["failed"]
    assert "second: 0.0 s: ArithmeticError: other numbers" in capsys.readouterr().out


def test_a_precision_that_fails_or_is_wrong_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def rollout(self: Checks, case: Any, tensors: Any, precision: str) -> float:
        if precision == "fp8":
            raise ArithmeticError("no such product")
        return {"bfloat16": math.nan}.get(precision, 1e-3)

    monkeypatch.setattr(Checks, "rollout", rollout)
    message = "dit_tiny_rollout, bfloat16, dit_tiny_rollout, fp8: nan"
    with pytest.raises(gpu_check.StepError, match=message) as raised:
        Checks(toy=True).rollouts()
    found = raised.value.found
    assert found["dit_tiny_rollout, float32"] == found["dit_tiny_rollout, fp8 attention"] == 1e-3
    assert found["dit_tiny_rollout, fp8"] == "ArithmeticError: no such product"


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert main(["--json", str(tmp_path / "check.json")]) == 2
    assert "torch finds no GPU; --toy runs the steps on the CPU" in capsys.readouterr().err
