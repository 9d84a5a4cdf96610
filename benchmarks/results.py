# SPDX-License-Identifier: Apache-2.0
"""Writes results/*.json: results with their command, commit, date, hardware, versions and code.

Every measuring command begins a `Measurement`. This module does not know what is measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
UNKNOWN = "unknown"
DIRTY = "-dirty"
KEYS = ("command", "commit", "date", "hardware", "versions", "code")
SERVER = ("longlive_serve", ":!longlive_serve/doctor", "model_repository")
"""The server's code, as git pathspecs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of a measuring command. Begin it before the work: a commit made meanwhile is not the code that ran."""

    command: str
    commit: str
    date: str

    @classmethod
    def begin(cls, module: str, argv: Sequence[str] | None) -> Measurement:
        """`argv`: the arguments of the command; None: those of this process."""
        words = ["python", "-m", module, *(sys.argv[1:] if argv is None else argv)]
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        return cls(command=shlex.join(words), commit=commit(), date=date)

    def header(self, *, code: Sequence[str], hardware: str = "", versions: Mapping[str, str]) -> dict[str, Any]:
        """The KEYS of a record. `code`: git pathspecs; a change in them makes the results stale. `hardware`: this
        machine's CPU by default."""
        return dataclasses.asdict(self) | {
            "hardware": hardware or cpu(),
            "versions": dict(versions),
            "code": list(code),
        }

    def write(
        self,
        path: Path,
        results: Mapping[str, Any],
        *,
        code: Sequence[str],
        hardware: str = "",
        versions: Mapping[str, str],
        section: str = "",
        top_level: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the header and `results` to a JSON file; dataclasses become objects.

        With `section`, write them to that key and `top_level` beside it; other keys of the file stay. The file is
        replaced atomically.
        """
        header = self.header(code=code, hardware=hardware, versions=versions)
        record = header | dict(results) | header  # `results` may hold an older header
        if section:
            record = {**read_results(path), **(top_level or {}), section: record}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(record, indent=2, default=dataclasses.asdict) + "\n", encoding="utf-8")
        partial.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    """The content of a results file; empty if it does not exist."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def format_table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown. `columns`: titles, and format strings that take a row's values."""
    return markdown_table([*columns], ([cell.format_map(row) for cell in columns.values()] for row in rows))


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout `root`, with the suffix DIRTY if its code was changed; UNKNOWN outside a checkout."""
    try:
        if git(root, "rev-parse", "--show-prefix"):  # installed inside another project's checkout
            return UNKNOWN
        head = git(root, "rev-parse", "HEAD")
        code = (".", ":!results", ":!docs", ":!*.md")  # not code
        return head + (DIRTY if git(root, "status", "--porcelain", "--untracked-files=no", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def git(root: Path, *arguments: str) -> str:
    """Run git in `root` and return its output."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu() -> str:
    """The CPU cores that this process may use."""
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of the installed ones of `packages`."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
