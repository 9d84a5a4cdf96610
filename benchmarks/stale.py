# SPDX-License-Identifier: Apache-2.0
"""Says which figures in results/ are older than the code that they were measured with: `python -m benchmarks.stale`.

A figure is not wrong because a line has changed; whoever reads the list decides what to measure again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.results import DIRTY, ROOT, UNKNOWN, git

RESULTS = ROOT / "results"


def headers(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What stands beside the figures of a file, by section; the whole file is the section with no name."""
    if "command" in record:
        return {"": record}
    return {name: part for name, part in record.items() if isinstance(part, dict) and "command" in part}


def changed(commit: str, code: Sequence[str], root: Path = ROOT) -> list[str] | None:
    """Files of `code` that are not as they were at `commit`; None if that cannot be told: git has no such commit."""
    if commit == UNKNOWN:
        return None
    try:
        names = git(root, "diff", "--name-only", commit.removesuffix(DIRTY), "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return names.splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stale", description=__doc__)
    parser.add_argument("--all", action="store_true", help="name every file that has changed, not only how many")
    args = parser.parse_args(argv)
    table = Table("figures", "measured at", "on", "of their code has changed")
    for path in sorted(RESULTS.glob("*.json")):
        for section, header in headers(json.loads(path.read_text(encoding="utf-8"))).items():
            files = changed(header["commit"], header["code"])
            if files is None:
                status = "cannot be told: git does not know the commit"
            else:
                status = "\n".join(files) if args.all and files else f"{len(files)} files" if files else "nothing"
            commit = header["commit"][:10] + (DIRTY if header["commit"].endswith(DIRTY) else "")
            table.add_row(f"{path.name} {section}".strip(), commit, header["date"], status)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
