# SPDX-License-Identifier: Apache-2.0
"""The result of one check: how severe it is, what was found and what to do; and results as aligned text.

Made by the other files of this folder, each of which checks one part of the machine.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

OK, NOTE, WARNING, ERROR = "ok", "note", "warning", "error"
"""As it should be; missing, but not needed to serve; serves, but not well; cannot serve."""


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """The result of one check."""

    level: str
    name: str
    """What was checked."""
    message: str
    action: str = ""
    """What to do; empty at the level OK."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Results that belong together."""

    title: str
    results: Sequence[CheckResult]


def format_sections(sections: Sequence[Section], width: int) -> Iterator[str]:
    """Lines of aligned text, at most `width` columns wide."""
    indent = max(len(result.name) for section in sections for result in section.results) + 13
    for section in sections:
        yield section.title
        for result in section.results:
            prefix = f"  {result.level:<9}{result.name}".ljust(indent)
            yield from wrap(prefix + result.message, width, indent)
            if result.action:
                yield from wrap(f"{' ' * indent}-> {result.action}", width, indent + 3)
        yield ""


def wrap(text: str, width: int, indent: int) -> list[str]:
    """Does not break paths and commands."""
    return textwrap.wrap(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB" if size < 10 else f"{size:,.1f} GiB"


def split_error(message: str) -> tuple[str, str]:
    """The message of an error, and the action that it names behind the last semicolon, if any."""
    text, _, action = message.rpartition("; ")
    return (text, action) if text else (message, "")
