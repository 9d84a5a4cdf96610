# SPDX-License-Identifier: Apache-2.0
"""What stands beside figures in a file of results: command, commit, date, hardware, versions, and the code in question.

Every command that measures begins a `Measurement`; what it measured, this module does not know.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
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

    def header(self, *, hardware: str, versions: Mapping[str, str], code: Sequence[str]) -> dict[str, Any]:
        """The KEYS of a record. `code`: files and folders whose change makes the figures old, as git names paths."""
        return dataclasses.asdict(self) | {"hardware": hardware, "versions": dict(versions), "code": list(code)}


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
    """Of Python and of packages that are installed."""
    return {"python": platform.python_version()} | {package: version(package) for package in packages}
