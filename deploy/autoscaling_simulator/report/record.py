# SPDX-License-Identifier: Apache-2.0
"""What was simulated in a JSON file: figures by trace on top, beside them what they were made with."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import Measurement, cpu, versions

RESULTS = Path(__file__).parents[3] / "results/autoscaling.json"
SECTION = "deploy.autoscaling_simulator"
CODE = ("deploy/autoscaling_simulator", "deploy/policy.toml")


def write_record(
    path: Path, made: Measurement, traces: Mapping[str, Mapping[str, Any]], made_with: Mapping[str, Any]
) -> None:
    """Dataclasses in `made_with` become objects."""
    record: dict[str, Any] = dict(traces)
    header = made.header(hardware=f"{cpu()}; simulated, no GPU", versions=versions("simpy", "numpy"), code=CODE)
    record[SECTION] = {**header, **made_with}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> dict[str, Any]:
    return dataclasses.asdict(value)
