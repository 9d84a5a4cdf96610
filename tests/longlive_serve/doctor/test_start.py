# SPDX-License-Identifier: Apache-2.0
"""`doctor --start`: what is said of a start, and of one that fails. Real starts: `benchmarks.start_up`, as a
command."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import pytest

from longlive_serve.doctor import __main__ as command
from longlive_serve.protocol.errors import ServerStartError

FREE = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]


def test_a_start_is_told_by_phase(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {"ready": 9.5, "triton": 0.4, "import": 1.2, "load": 3.0, "warm_up": 4.9}
    monkeypatch.setattr("longlive_serve.doctor.start.measure_starts", lambda path: {"cold": seconds, "cached": seconds})
    assert command.main([*FREE, "--start"]) == 0
    told = capsys.readouterr().out
    assert "empty caches" in told
    assert "ready after 9.5 s: triton 0.4 s, import 1.2 s, load 3.0 s, warm-up 4.9 s" in told


def test_a_start_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(path: Path) -> NoReturn:
        raise ServerStartError("the model's process ended")

    monkeypatch.setattr("longlive_serve.doctor.start.measure_starts", fail)
    assert command.main([*FREE, "--start"]) == 1
    assert "cannot serve here: start: the model's process ended" in capsys.readouterr().out
