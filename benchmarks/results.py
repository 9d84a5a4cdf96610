# SPDX-License-Identifier: Apache-2.0
"""The one writer of results/*.json: results with the command, commit, date, hardware, versions and code behind them.

Every command that measures begins a `Measurement`; what it measured, this module does not know.
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
"""The code of a server, as git names paths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurement:
    """A command that measures. It begins before the work does: a commit that is made meanwhile is not what ran."""

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
        """The KEYS of a record. `code`: files and folders whose change makes the results stale, as git names paths.
        `hardware`: this machine's CPU by default."""
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

        With a `section` they go there, `top_level` beside it, and all else in the file stays. The file is replaced
        whole, so a reader never sees half of it.
        """
        header = self.header(code=code, hardware=hardware, versions=versions)
        record = header | dict(results) | header  # the header first, also where `results` are those of an older file
        if section:
            record = {**read_results(path), **(top_level or {}), section: record}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(json.dumps(record, indent=2, default=dataclasses.asdict) + "\n", encoding="utf-8")
        partial.replace(path)


def read_results(path: Path) -> dict[str, Any]:
    """What a file of results holds; nothing if there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (header, ["---"] * len(header), *rows))


def format_table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Markdown. `columns`: titles, and format strings that take a row's values."""
    return markdown_table([*columns], ([cell.format_map(row) for cell in columns.values()] for row in rows))


def commit(root: Path = ROOT) -> str:
    """The commit of the checkout `root`, ending in DIRTY when its code is another; UNKNOWN outside of a checkout."""
    try:
        if git(root, "rev-parse", "--show-prefix"):  # installed somewhere inside a checkout of something else
            return UNKNOWN
        head = git(root, "rev-parse", "HEAD")
        code = (".", ":!results", ":!docs", ":!*.md")  # what commands write and what nobody runs
        return head + (DIRTY if git(root, "status", "--porcelain", "--untracked-files=no", "--", *code) else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def git(root: Path, *arguments: str) -> str:
    """What git prints in `root`."""
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def cpu() -> str:
    """The processor of this machine, as far as this process may use it."""
    return f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()})"


def versions(*packages: str) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
