# SPDX-License-Identifier: Apache-2.0
"""Whether this Python can run the server: its version, and the parts that must be installed with it.

`make` runs this file before anything is installed, with any Python from 3.7 on; `find_triton.py` uses it again.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import sysconfig
from pathlib import Path

VERSION = (sys.version_info[0], sys.version_info[1])
SUPPORTED = ((3, 11), (3, 12))
# Seen with NumPy 2.1: an incoming tensor repeats its first byte, an outgoing one is empty.
NUMPY_1 = "the Python backend in nvidia-pytriton was compiled for NumPy 1 and garbles the arrays of NumPy 2"


class InterpreterError(RuntimeError):
    """This Python cannot run the server; the message says what to do about it."""


def check() -> None:
    """Raise InterpreterError unless a server can be set up and run with this Python."""
    _check_version()
    if importlib.util.find_spec("ensurepip") is None:
        raise InterpreterError(
            f"{sys.executable}: got no module ensurepip, expected it, to make a virtual environment; "
            f"apt-get install python{_text(VERSION)}-venv"
        )
    find_libpython()


def find_libpython() -> Path | None:
    """The shared library that Triton's Python backend links; None: the system's loader finds it."""
    name = f"libpython{_text(VERSION)}.so.1.0"
    folders = (Path(str(sysconfig.get_config_var("LIBDIR"))), Path(sys.base_prefix, "lib"))
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if found:
        return found[0]
    try:
        ctypes.CDLL(name)
    except OSError:
        raise InterpreterError(
            f"{sys.executable}: got no {name}, expected it in {folders[0]}, for Triton's Python backend; "
            f"apt-get install libpython{_text(VERSION)}, or use a Python that was built with --enable-shared"
        ) from None
    return None


def _check_version() -> None:
    if VERSION in SUPPORTED:
        return
    reason = f": {NUMPY_1}, and NumPy 1 has no wheels for newer ones" if SUPPORTED[-1] < VERSION else ""
    raise InterpreterError(
        f"{sys.executable}: got Python {_text(VERSION)}, expected {' or '.join(map(_text, SUPPORTED))}{reason}; "
        f"make PYTHON=python{_text(SUPPORTED[-1])} (docs/install.md says what runs with other versions)"
    )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


if __name__ == "__main__":
    try:
        check()
    except InterpreterError as error:
        sys.exit(f"error: {error}")
