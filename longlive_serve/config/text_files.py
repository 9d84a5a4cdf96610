# SPDX-License-Identifier: Apache-2.0
"""Reads text files as UTF-8, with or without a byte-order mark, independent of the locale.

Used for settings and prompt files. In Triton's Python the default encoding is ASCII.
"""

from __future__ import annotations

import codecs
from pathlib import Path

_WIDE = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # UTF-32 first: its LE mark starts with that of UTF-16


def read_text(path: Path | str) -> str:
    """The text of a file. Raises OSError, and ValueError with the encoding found and the one expected."""
    data = Path(path).read_bytes()
    for mark, name in _WIDE.items():
        if data.startswith(mark):
            raise ValueError(f"got {name} text, expected UTF-8; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"line {line}: got the byte 0x{data[error.start]:02x}, which is not UTF-8; save it as UTF-8"
        ) from None
