# SPDX-License-Identifier: Apache-2.0
"""Runs every command at its smallest size and reports the time of each: `python -m tests.project.smoke --json FILE`.

The commands are those of `test_commands`; for commands that other tests run, it reports the time of these tests.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.results import Measurement, versions
from tests.support.command_table import ELSEWHERE, SKIPPED, SMOKES, Elsewhere, Skipped, Smoke
from tests.support.commands import FOLDERS, ROOT, file_of_test, of_make, verbs


class Seconds:
    """A pytest plugin: duration (without fixtures) and outcome of each test, by node id."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.of[report.nodeid] = report.duration
            self.ended[report.nodeid] = report.outcome


def nodeid(one: Smoke | Elsewhere) -> str:
    if isinstance(one, Smoke):
        return f"tests/project/test_commands.py::test_a_command_runs[{one.command}]"
    file, _, name = one.test.partition(".")
    return f"{file_of_test(file)}::{name}"


@functools.cache
def run_by() -> dict[str, list[str]]:
    """Makefile targets by the module that they run."""
    found: dict[str, list[str]] = {}
    for verb in verbs():
        for module in dict.fromkeys(one.module for one in of_make(verb)):
            found.setdefault(module, []).append(f"make {verb}")
    return found


def named(one: Smoke | Elsewhere | Skipped) -> dict[str, str | float]:
    command = one.command if isinstance(one, Smoke) else f"{one.module} {one.options}".rstrip()
    return {"command": f"python -m {command}", "verbs": ", ".join(run_by().get(command.split()[0], []))}


def rows(seconds: Seconds) -> list[dict[str, str | float]]:
    """A row for each command, with its seconds or the reason why it is skipped."""
    found: list[dict[str, str | float]] = []
    for one in (*SMOKES, *ELSEWHERE):
        row = named(one)
        ids = [known for known in seconds.of if known == nodeid(one) or known.startswith(f"{nodeid(one)}[")]
        row |= {"seconds": round(sum(seconds.of[known] for known in ids), 1)}
        row |= {"ended": ", ".join(sorted({seconds.ended[known] for known in ids})) or "did not run"}
        found.append(row if isinstance(one, Smoke) else row | {"test": nodeid(one)})
    return found + [named(one) | {"skipped": one.reason} for one in SKIPPED]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.project.smoke", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the list to this file")
    args = parser.parse_args(argv)
    measurement = Measurement.begin("tests.project.smoke", argv)
    seconds = Seconds()
    wanted = [
        str(ROOT / "tests/project/test_commands.py"),
        *dict.fromkeys(str(ROOT / nodeid(one)) for one in ELSEWHERE),
    ]
    code = pytest.main(["-q", f"--rootdir={ROOT}", *wanted], plugins=[seconds])
    table = Table("command", "verbs", "seconds", "ended")
    for row in rows(seconds):
        table.add_row(
            *(str(row.get(key, "")) for key in ("command", "verbs", "seconds")),
            str(row.get("ended", row.get("skipped"))),
        )
    Console(width=150).print(table, markup=False)
    if args.json is not None:
        code_of_commands = [*FOLDERS, "Makefile"]
        results = {"commands": rows(seconds)}
        measurement.write(args.json, results, code=code_of_commands, versions=versions("torch", "pytest"))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
