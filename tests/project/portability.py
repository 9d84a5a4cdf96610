# SPDX-License-Identifier: Apache-2.0
"""Checks the tests on other processors: `python -m tests.project.portability --json results/portability.json`.

Runs the whole suite normally and beside two busy loops, and the numeric tests (`-m numeric`) with libraries limited to
older instruction sets or with other numbers of threads: each setting changes the order of sums. Exit code 1 if a test
fails. The file keeps the results of settings that are not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.engines.record import torch_versions
from benchmarks.results import Measurement, cpu, read_results

ROOT = Path(__file__).parents[2]
SECTION = "tests.project.portability"
CODE = (
    "longlive_serve",
    "client",
    "benchmarks",
    "deploy",
    "export",
    "quantization",
    "training",
    "stress",
    "model_repository",
    "tests",
)
WHOLE = "whole suite"
BUSY_LOOPS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to run the tests."""

    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    busy_loops: int = 0
    numeric: bool = True
    """Run only the numeric tests."""


def _variables(*settings: str) -> dict[str, Setting]:
    return {setting: Setting(environment=dict(one.split("=") for one in setting.split())) for setting in settings}


SETTINGS = {
    WHOLE: Setting(numeric=False),
    f"{WHOLE} beside {BUSY_LOOPS} busy loops": Setting(numeric=False, busy_loops=BUSY_LOOPS),
    **_variables(
        "ATEN_CPU_CAPABILITY=default",
        "ATEN_CPU_CAPABILITY=avx2",
        "ONEDNN_MAX_CPU_ISA=SSE41",
        "ONEDNN_MAX_CPU_ISA=AVX2",
        "MKL_ENABLE_INSTRUCTIONS=SSE4_2",
        "OMP_NUM_THREADS=1",
        "OMP_NUM_THREADS=2",
        "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41",
    ),
}


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run processes that occupy a core each; they also end with this process."""
    loop = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", loop]))
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def run(setting: Setting, arguments: Sequence[str], log: Path) -> dict[str, Any]:
    """Run one setting; pytest's output goes to `log`. Raises RuntimeError if pytest ran no tests."""
    began = time.monotonic()
    report = log.with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "--numprocesses=auto", f"--junit-xml={report}", *arguments]
    command += ["-m", "numeric"] if setting.numeric else []
    with busy_loops(setting.busy_loops), log.open("w", encoding="utf-8") as out:
        pytest = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **setting.environment}, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            code = pytest.wait()
        finally:
            stop(pytest)
    figures = counts(report) if report.exists() else {}
    if code > 1 or not figures.get("passed", 0) + figures.get("failed", 0):
        raise RuntimeError(f"pytest ended with {code} and ran no tests to the end; see {log}")
    return {**figures, "minutes": round((time.monotonic() - began) / 60, 2)}


def stop(process: subprocess.Popen[bytes]) -> None:
    """Send SIGINT first, so that the tests stop their servers."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def counts(report: Path) -> dict[str, int]:
    """Passed, failed and skipped tests of a JUnit file. An error outside of a test counts as failed."""
    found = {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[outcome] += 1
    return found


def write_record(path: Path, measurement: Measurement, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Update the results of these settings in the file; others stay."""
    known = {**read_results(path).get(SECTION, {}).get("settings", {}), **settings}
    ordered = {name: known[name] for name in SETTINGS if name in known}
    top_level = {"failed": sum(counts["failed"] for counts in ordered.values())}
    if WHOLE in ordered:
        top_level["make_test_minutes"] = ordered[WHOLE]["minutes"]
    measurement.write(
        path,
        {"settings": ordered},
        code=CODE,
        hardware=f"{cpu()}, {processor()}, {torch.backends.cpu.get_cpu_capability()}",
        versions=torch_versions(),
        section=SECTION,
        top_level=top_level,
    )


def processor() -> str:
    """The CPU model from /proc/cpuinfo."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.machine()


def chosen(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SETTINGS:
            raise argparse.ArgumentTypeError(f"got {name!r}, expected some of {', '.join(SETTINGS)}")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {SECTION}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    text = f"only these settings, comma-separated (default: all): {'; '.join(SETTINGS)}"
    parser.add_argument("--only", type=chosen, metavar="NAME,...", default=list(SETTINGS), help=text)
    parser.add_argument("--json", type=Path, help="write the results to this file, after every setting")
    parser.add_argument("--logs", type=Path, help="folder for pytest's output (default: a new one)")
    parser.add_argument("tests", nargs="*", help="files for pytest (default: all)")
    arguments = parser.parse_args(argv)
    logs = arguments.logs or Path(tempfile.mkdtemp(prefix="portability-"))
    logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    measurement = Measurement.begin(SECTION, argv)
    table = Table("setting", "passed", "failed", "skipped", "minutes", title=f"output of pytest: {logs}")
    failed = 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for number, name in enumerate(arguments.only, 1):
                task = progress.add_task(f"{number} of {len(arguments.only)}: {name}", total=None)
                figures = run(SETTINGS[name], arguments.tests, logs / f"{name.replace(' ', '-')}.log")
                progress.remove_task(task)
                failed += figures["failed"]
                table.add_row(name, *(str(figures[key]) for key in ("passed", "failed", "skipped", "minutes")))
                if arguments.json:
                    write_record(arguments.json, measurement, {name: figures})
    except RuntimeError as error:
        print(f"portability: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("portability: stopped; finished settings are saved", file=sys.stderr)
        return 130
    finally:
        if table.row_count:
            Console().print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
