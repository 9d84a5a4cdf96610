# SPDX-License-Identifier: Apache-2.0
"""The server's log: text lines or JSON objects, each with the session that it belongs to."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Iterator


class JsonLines(logging.Formatter):
    """One JSON object per record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S") + f".{record.msecs:03.0f}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "session": getattr(record, "session", None),
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps({name: value for name, value in fields.items() if value is not None})


class Lines(logging.Formatter):
    """One text line per record, with its session."""

    def format(self, record: logging.LogRecord) -> str:
        session = getattr(record, "session", None)
        line = super().format(record)
        return line if session is None else f"{line} (session {session})"


def set_up(style: str) -> None:
    """Log to stderr; `style`: text or json."""
    if isinstance(sys.stderr, io.TextIOWrapper):  # Triton's embedded Python uses ASCII
        sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else Lines("%(asctime)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


@contextlib.contextmanager
def at_level(name: str, level: int) -> Iterator[None]:
    """Set the logger `name` to `level` in the block, and restore its level afterwards."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)
