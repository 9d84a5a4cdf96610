# SPDX-License-Identifier: Apache-2.0
"""Figures in a JSON file: a section for each command that measures, and the figures that others look up on top."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import SERVER, Measurement, cpu, versions


def write_record(
    path: Path, section: str, code: str, made: Measurement, figures: Mapping[str, Any], on_top: Mapping[str, float]
) -> None:
    """Put `figures` into a section of the file, and what they were measured with; the other sections stay.

    `section`: the name of the first measurement of the kind, which readers look for. `code`: the command's own.
    """
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record.update(on_top)
    header = made.header(
        hardware=f"{cpu()}, clients and servers together",
        versions=versions("tritonclient"),
        code=[*SERVER, "client", "benchmarks/serving", code],
    )
    record[section] = {**header, "vae": "in every figure", **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
