# SPDX-License-Identifier: Apache-2.0
"""Runs every command at its smallest size and says how many seconds each took: `python -m tests.smoke --json FILE`.

The commands are those of `test_commands`; what other tests run is timed as those tests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from longlive_serve.results import Measurement, cpu, versions
from tests.commands import ROOT
from tests.test_commands import ELSEWHERE, SKIPPED, SMOKES, Elsewhere, Smoke


class Seconds:
    """A plugin of pytest: how long each test took, by its id, what it was given included; and how it ended."""

    def __init__(self) -> None:
        self.of: dict[str, float] = {}
        self.ended: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.of[report.nodeid] = self.of.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self.ended[report.nodeid] = report.outcome


def nodeid(one: Smoke | Elsewhere) -> str:
    if isinstance(one, Smoke):
        return f"tests/test_commands.py::test_a_command_runs[{one.command}]"
    file, _, name = one.test.partition(".")
    return f"tests/{file}.py::{name}"


def rows(seconds: Seconds) -> list[dict[str, str | float]]:
    """A row for each command: as it is run, and its seconds or why there are none."""
    found: list[dict[str, str | float]] = []
    for one in (*SMOKES, *ELSEWHERE):
        command = one.command if isinstance(one, Smoke) else f"{one.module} {one.options}".rstrip()
        row: dict[str, str | float] = {"command": f"python -m {command}"}
        ids = [known for known in seconds.of if known == nodeid(one) or known.startswith(f"{nodeid(one)}[")]
        row |= {"seconds": round(sum(seconds.of[known] for known in ids), 1)}
        row |= {"ended": ", ".join(sorted({seconds.ended[known] for known in ids})) or "did not run"}
        found.append(row if isinstance(one, Smoke) else row | {"test": nodeid(one)})
    return found + [
        {"command": f"python -m {one.module} {one.options}".rstrip(), "skipped": one.reason} for one in SKIPPED
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.smoke", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the list to this file")
    args = parser.parse_args(argv)
    made = Measurement.begin("tests.smoke", argv)
    seconds = Seconds()
    wanted = [str(ROOT / "tests/test_commands.py"), *dict.fromkeys(str(ROOT / nodeid(one)) for one in ELSEWHERE)]
    code = pytest.main(["-q", f"--rootdir={ROOT}", *wanted], plugins=[seconds])
    table = Table("command", "seconds", "ended")
    for row in rows(seconds):
        table.add_row(
            *(str(row.get(key, "")) for key in ("command", "seconds")), str(row.get("ended", row.get("skipped")))
        )
    Console(width=150).print(table, markup=False)
    if args.json is not None:
        header = made.header(hardware=cpu(), versions=versions("torch", "pytest"), code=["."])
        args.json.write_text(json.dumps(header | {"commands": rows(seconds)}, indent=2) + "\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
