# SPDX-License-Identifier: Apache-2.0
"""Lists the results in results/ whose code has changed since they were measured: `python -m benchmarks.stale`.

A listed result is not necessarily wrong; decide from the changed files what to measure again.
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
    """The records of a results file, by section; a file without sections is one record with the name ""."""
    if "command" in record:
        return {"": record}
    return {name: part for name, part in record.items() if isinstance(part, dict) and "command" in part}


def changed(commit: str, code: Sequence[str], root: Path = ROOT) -> list[str] | None:
    """Files of `code` that changed since `commit`; None if git does not know the commit."""
    if commit == UNKNOWN:
        return None
    try:
        names = git(root, "diff", "--name-only", commit.removesuffix(DIRTY), "--", *code)
    except (OSError, subprocess.CalledProcessError):
        return None
    return names.splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stale", description=__doc__)
    parser.add_argument("--all", action="store_true", help="list the changed files, not only their number")
    args = parser.parse_args(argv)
    table = Table("results", "commit", "date", "changed code")
    for path in sorted(RESULTS.glob("*.json")):
        for section, header in headers(json.loads(path.read_text(encoding="utf-8"))).items():
            files = changed(header["commit"], header["code"])
            if files is None:
                status = "unknown: git does not know the commit"
            else:
                status = "\n".join(files) if args.all and files else f"{len(files)} files" if files else "nothing"
            commit = header["commit"][:10] + (DIRTY if header["commit"].endswith(DIRTY) else "")
            table.add_row(f"{path.name} {section}".strip(), commit, header["date"], status)
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
