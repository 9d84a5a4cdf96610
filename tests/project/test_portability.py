# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.project.portability`: counts, the results file, and no leftover processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.results import Measurement
from tests.fakes.service_bench import wait_until
from tests.project import portability
from tests.project.portability import SECTION, SETTINGS, WHOLE, Setting, busy_loops, main, write_record

NAME = "OMP_NUM_THREADS=2"
CASES = """
import os, pytest
pytestmark = pytest.mark.numeric

def test_passes():
    assert os.environ["OMP_NUM_THREADS"] == "2"

def test_fails():
    assert False

@pytest.fixture
def broken():
    raise ValueError

def test_has_an_error(broken):
    pass

def test_is_skipped():
    pytest.skip("no reason")
"""


@pytest.fixture
def cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(portability, "ROOT", tmp_path)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "1")  # there is little to share
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = numeric\n")
    (tmp_path / "test_cases.py").write_text(CASES)
    return tmp_path


def test_what_pytest_found_is_counted_and_an_earlier_setting_stays(cases: Path) -> None:
    record = cases / "results/portability.json"
    earlier = {"passed": 9, "failed": 0, "skipped": 1, "minutes": 3.5}
    write_record(record, Measurement.begin(SECTION, []), {WHOLE: earlier})
    assert main(["--only", NAME, "--json", str(record), "--logs", str(cases / "logs")]) == 1
    whole = json.loads(record.read_text(encoding="utf-8"))
    assert (whole["failed"], whole["make_test_minutes"]) == (2, 3.5)
    section = whole[SECTION]
    assert list(section["settings"]) == [WHOLE, NAME]
    assert section["settings"][WHOLE] == earlier
    minutes = section["settings"][NAME].pop("minutes")
    assert 0 < minutes < 10
    assert section["settings"][NAME] == {"passed": 1, "failed": 2, "skipped": 1}
    assert section["versions"]["torch"]
    assert "test_fails" in (cases / f"logs/{NAME}.log").read_text(encoding="utf-8")


def test_a_run_without_tests_is_no_success(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cases / "test_cases.py").write_text("", encoding="utf-8")
    assert main(["--only", NAME]) == 2
    assert "ran no tests to the end; see" in capsys.readouterr().err
    (cases / "test_cases.py").write_text("import nothing_of_that_name", encoding="utf-8")
    assert main(["--only", NAME]) == 1


def test_an_unknown_setting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "AVX9"])
    assert "got 'AVX9', expected some of whole suite," in capsys.readouterr().err


def test_all_settings_are_there() -> None:
    assert [name for name, setting in SETTINGS.items() if not setting.numeric] == list(SETTINGS)[:2]
    assert len(SETTINGS) == 10
    assert Setting().busy_loops == 0
    both = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    assert SETTINGS["ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41"].environment == both


def test_busy_loops_end_with_what_they_are_for() -> None:
    with busy_loops(2) as running:
        assert all(process.poll() is None for process in running)
    assert all(process.poll() is not None for process in running)


def test_a_terminated_run_leaves_no_process(cases: Path) -> None:
    (cases / "test_cases.py").write_text(
        "import pathlib, time\ndef test_one():\n    pathlib.Path('up').touch()\n    time.sleep(60)"
    )
    code = (
        f"import pathlib; from tests.project import portability as p; p.ROOT = pathlib.Path({str(cases)!r}); "
        f"p.SETTINGS[{NAME!r}] = p.Setting(busy_loops=1, numeric=False); raise SystemExit(p.main(['--only', {NAME!r}]))"
    )
    running = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.PIPE)
    wait_until((cases / "up").exists)
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 130
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("a process is left")
