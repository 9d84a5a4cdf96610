# SPDX-License-Identifier: Apache-2.0
"""TOML with errors that help: which file, which key, what was got, what was expected and what to do.

Read by the settings of the server and by those of others; writes what the server hands to its model.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_serve.config.text_files import read_text

BACKSLASH_HINT = "; in double quotes a backslash begins an escape: write 'C:\\folder' in single quotes, or C:/folder"


def read_toml(path: Path | str) -> dict[str, Any]:
    """The values of a file. Raises ValueError that names it."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as TOML: {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: cannot be read as TOML: {error}{_backslash_hint(text, str(error))}") from None


def check_path(path: str) -> str:
    """The path of a file or folder as given. Raises ValueError for one that escapes have crept into: "C:\\new"."""
    if not path.isprintable():
        raise ValueError(f"got {path!r}, expected a path without control characters{BACKSLASH_HINT}")
    return path


def typed(kinds: Mapping[str, type], values: Mapping[str, Any], others: Collection[str] = ()) -> dict[str, Any]:
    """The `values` without those of `others`, each of its type; a whole number may stand for a float.

    Raises ValueError for a key of neither `kinds` nor `others`, and for a value of another type.
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        if key in others:
            continue
        if key not in kinds:
            raise ValueError(f"got unknown key {key!r}, expected some of {sorted([*kinds, *others])}")
        if kinds[key] is float and type(value) is int:
            found[key] = float(value)
        elif type(value) is kinds[key]:
            found[key] = value
        else:
            raise ValueError(f"{key}: got {value!r}, expected {kinds[key].__name__}")
    return found


def as_toml(values: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Strings, numbers and truth values, then the tables of each array."""
    lines = [*_lines(values)]
    for name, rows in tables.items():
        for row in rows:
            lines += [f"[[{name}]]", *_lines(row)]
    return "\n".join([*lines, ""])


def _lines(values: Mapping[str, Any]) -> Iterable[str]:
    """TOML's strings are JSON's, where no character is escaped that need not be; so are its numbers."""
    return (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def _backslash_hint(text: str, error: str) -> str:
    """A Windows path in double quotes: TOML takes its backslashes for escapes."""
    found = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    if found is None or "\\" not in "".join(lines[int(found[1]) - 1 : int(found[1])]):
        return ""
    return BACKSLASH_HINT
