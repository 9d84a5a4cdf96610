# SPDX-License-Identifier: Apache-2.0
"""Reads TOML with errors that name the file, the key, the value and what is expected; writes simple TOML.

Used by the settings of the server and of other tools.
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
    """The values of a file. Raises ValueError that names the file."""
    try:
        text = read_text(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as TOML: {error}") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: cannot be read as TOML: {error}{_backslash_hint(text, str(error))}") from None


def check_path(path: str) -> str:
    """Returns `path`. Raises ValueError if it contains unintended escapes, such as in "C:\\new"."""
    if not path.isprintable():
        raise ValueError(f"got {path!r}, expected a path without control characters{BACKSLASH_HINT}")
    return path


def typed(kinds: Mapping[str, type], values: Mapping[str, Any], others: Collection[str] = ()) -> dict[str, Any]:
    """The `values` except those of `others`, with types checked; an int is accepted for a float.

    Raises ValueError for a key that is in neither `kinds` nor `others`, and for a value of another type.
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
    """TOML of strings, numbers and booleans, followed by arrays of tables."""
    lines = [*_lines(values)]
    for name, rows in tables.items():
        for row in rows:
            lines += [f"[[{name}]]", *_lines(row)]
    return "\n".join([*lines, ""])


def _lines(values: Mapping[str, Any]) -> Iterable[str]:
    """JSON strings and numbers are valid TOML if no character is escaped unnecessarily."""
    return (f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items())


def _backslash_hint(text: str, error: str) -> str:
    """A hint for a Windows path in double quotes, where TOML reads backslashes as escapes."""
    found = re.search(r"at line (\d+)", error)
    lines = text.splitlines()
    if found is None or "\\" not in "".join(lines[int(found[1]) - 1 : int(found[1])]):
        return ""
    return BACKSLASH_HINT
