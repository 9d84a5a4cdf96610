# SPDX-License-Identifier: Apache-2.0
"""The golden rollouts through the real model runner, as cases of `longlive_serve.replay`."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longlive_serve.replay import ReplayCase, exact_latents, load_case_tensors, main, rounding
from tests.support.cases import ROLLOUTS, write_case
from tests.support.tolerance import GOLDEN, error


def run_replay(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, in this process: it need not load PyTorch each time."""
    words, out, err = [*map(str, arguments)], io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def error_of(output: str) -> float:
    label, value = output.split()
    assert label == "max_abs_err_over_max_abs:"
    return float(value)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_golden_rollout_is_met(tmp_path: Path, name: str) -> None:
    """By the command with its own tolerance, and by the float64 run that this comes from."""
    path = write_case(tmp_path, name)
    done = run_replay(path)
    assert done.returncode == 0, done.stdout + done.stderr
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    assert error(tensors["latents"], exact_latents(case, tensors)) <= GOLDEN
    assert GOLDEN < rounding(case, tensors) < 1e-4, "or a wrong setting would not be seen"


@pytest.mark.numeric
@pytest.mark.parametrize(
    "wrong",
    [
        {"switches": []},
        {"switches": [17, 22]},
        {"global_sink": False},
        {"relative": True},
        {"window": 15},
        {"sink": 0},
    ],
)
def test_wrong_settings_are_seen(tmp_path: Path, wrong: dict[str, Any]) -> None:
    done = run_replay(write_case(tmp_path, "dit_tiny_switch_mid_sinkT", **wrong))
    assert done.returncode == 1
    assert error_of(done.stdout) > 5e-3


@pytest.mark.numeric
def test_the_tolerance_decides(tmp_path: Path) -> None:
    case = write_case(tmp_path, "dit_tiny_rollout")
    assert run_replay(case, "--tolerance", "1e-12").returncode == 1
    bf16 = run_replay(case, "--dtype", "bfloat16", "--tolerance", "1")
    assert bf16.returncode == 0
    assert 2**-10 < error_of(bf16.stdout) < 0.5  # a result of bfloat16 has a rounding of 2^-9 at least somewhere


def test_nan_is_not_within_tolerance(tmp_path: Path) -> None:
    case = write_case(tmp_path, "dit_tiny_rollout")
    from safetensors.torch import load_file

    tensors = load_file(case.with_suffix(".safetensors"))
    tensors["weights.head.head.bias"] = torch.full_like(tensors["weights.head.head.bias"], float("nan"))
    save_file(tensors, case.with_suffix(".safetensors"))
    assert run_replay(case).returncode == 1


def test_tensors_that_do_not_fit_the_case_are_named(tmp_path: Path) -> None:
    done = run_replay(write_case(tmp_path, "dit_tiny_rollout", chunks=11))
    assert done.returncode == 2
    assert "noise: got (1, 30, 16, 4, 16), expected (1, 33, 16, 4, 16)" in done.stderr
    done = run_replay(write_case(tmp_path, "dit_tiny_rollout", switches=[3, 6, 9, 12]))
    assert "prompt_embeds.p4: got nothing" in done.stderr


def test_a_case_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    path.write_text('{"config": {}}')
    done = run_replay(path)
    assert done.returncode == 2
    assert str(path) in done.stderr


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--backend", "fused", "--graphs", "."], "--graphs: got --backend fused as well, expected one of them"),
        (["--fp8"], "--fp8: got --backend torch, expected fused"),
        (["--backend", "turbo"], "invalid choice: 'turbo'"),
    ],
)
def test_options_that_exclude_each_other_are_named(
    options: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["case.json", *options])
    assert complaint in capsys.readouterr().err


def test_without_triton_the_fused_engine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "longlive_serve.backends.fused.dit", None)
    assert main([str(write_case(tmp_path, "dit_tiny_rollout")), "--backend", "fused"]) == 2
    assert "--backend fused" in capsys.readouterr().err
