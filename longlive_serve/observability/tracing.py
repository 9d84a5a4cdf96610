# SPDX-License-Identifier: Apache-2.0
"""A timeline of one session as a trace file (Chrome's trace format; https://ui.perfetto.dev opens it).

Written by the engine core's worker for every session when `trace_dir` is set.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

MAX_EVENTS = 200_000  # about a day of one session; later ones are dropped


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """An interval of work. Times are monotonic seconds."""

    name: str
    start_time: float
    seconds: float


class Trace:
    """The events of one session."""

    def __init__(self, session_id: str) -> None:
        self._session_id = session_id
        self._events: list[dict[str, Any]] = []

    def add(self, phase: Phase, row: str, **args: Any) -> None:
        """`row`: the row of the timeline that shows it."""
        event = {"name": phase.name, "ph": "X", "ts": phase.start_time * 1e6, "dur": phase.seconds * 1e6, "args": args}
        if len(self._events) < MAX_EVENTS:
            self._events.append(event | {"pid": self._session_id, "tid": row})

    def write(self, folder: Path) -> Path:
        """Write `<session id>.json`, without characters that are unsafe in file names. Returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9_-]', '', self._session_id)[:64] or 'session'}.json"
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}), encoding="utf-8")
        return path
