# SPDX-License-Identifier: Apache-2.0
"""Figures in a JSON file: a section for each command that measures, and the figures that others look up on top."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def write_record(
    path: Path,
    section: str,
    argv: Sequence[str] | None,
    figures: Mapping[str, Any],
    on_top: Mapping[str, float],
) -> None:
    """Put `figures` into a section of the file, and what they were measured with; the other sections stay.

    `argv`: the arguments of the command; None: those of this process. `section`: the command's module.
    """
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    record.update(on_top)
    record[section] = {
        "command": f"python -m {section} {' '.join(sys.argv[1:] if argv is None else argv)}".rstrip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}), clients and servers together",
        "versions": {"python": platform.python_version(), "tritonclient": version("tritonclient")},
        "vae": "in every figure",
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
