# SPDX-License-Identifier: Apache-2.0
"""What was simulated in a JSON file: figures by trace on top, beside them what they were made with."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "results/autoscaling.json"
SECTION = "deploy.simulator"


def write_record(
    path: Path, argv: Sequence[str] | None, traces: Mapping[str, Mapping[str, Any]], made_with: Mapping[str, Any]
) -> None:
    """`argv`: the arguments of the command; None: those of this process. Dataclasses in `made_with` become objects."""
    record: dict[str, Any] = dict(traces)
    record[SECTION] = {
        "command": f"python -m {SECTION} {' '.join(sys.argv[1:] if argv is None else argv)}".rstrip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU cores ({platform.machine()}); simulated, no GPU",
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("simpy", "numpy")},
        **made_with,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n")


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)
