# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds: one thing each, how grave it is, and what to do about it; and sections of them as text.

Made by the other files of this folder, which look at one part of the machine each.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
"""All is well; something is not there that somebody else may want; it will serve, but badly; it cannot serve."""
_COLOURS = {OK: "32", NOTE: "36", WARNING: "33", PROBLEM: "1;31"}


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """One thing that was looked at."""

    level: str
    subject: str
    found: str
    action: str = ""
    """What to do; empty where all is well."""


@dataclasses.dataclass(frozen=True)
class Section:
    """Findings that belong together."""

    title: str
    results: Sequence[CheckResult]


def lines_of(sections: Sequence[Section], width: int, colours: bool) -> Iterator[str]:
    """The sections as aligned text of at most `width` columns."""
    margin = max(len(result.subject) for section in sections for result in section.results) + 13
    for section in sections:
        yield f"\033[1m{section.title}\033[0m" if colours else section.title
        for result in section.results:
            begin = f"  {result.level:<9}{result.subject}".ljust(margin)
            first, *others = wrap(begin + result.found, width, margin)
            yield first.replace(result.level, paint(result.level), 1) if colours else first
            yield from others
            if result.action:
                yield from wrap(f"{' ' * margin}-> {result.action}", width, margin + 3)
        yield ""


def wrap(text: str, width: int, margin: int) -> list[str]:
    """Paths and commands stay whole."""
    return textwrap.wrap(text, width, subsequent_indent=" " * margin, break_long_words=False, break_on_hyphens=False)


def paint(level: str) -> str:
    return f"\033[{_COLOURS[level]}m{level}\033[0m"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB" if count < 10 else f"{count:,.1f} GiB"


def split(message: str) -> tuple[str, str]:
    """An error of this package as what was found and what to do: its own last words, behind a semicolon."""
    found, _, action = message.rpartition("; ")
    return (found, action) if found else (message, "")
