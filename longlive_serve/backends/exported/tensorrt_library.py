# SPDX-License-Identifier: Apache-2.0
"""Selects the library behind `import tensorrt`: TensorRT (data centers) or TensorRT for RTX (consumer GPUs).

Their Python APIs agree in everything used here, so the builder and the session are written once, against `tensorrt`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import sys
from pathlib import Path

TENSORRT, TENSORRT_RTX = LIBRARIES = ("tensorrt", "tensorrt_rtx")
_MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_FROM = {
    TENSORRT: "NVIDIA's container or `pip install tensorrt-cu13`",
    TENSORRT_RTX: "`pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings`",
}


def use(library: str) -> None:
    """Make `import tensorrt` import `library`. Raises ValueError if it is not installed or the other is in use."""
    in_use = sys.modules.get("tensorrt")
    if in_use is not None and in_use.__name__ not in _MODULES[library]:
        raise ValueError(f"got {library}, but this process already uses {in_use.__name__}; expected only one of them")
    _load_shared_libraries(f"{library}_libs")
    for name in _MODULES[library]:
        try:
            sys.modules["tensorrt"] = importlib.import_module(name)
        except ImportError:
            continue
        return
    raise ValueError(
        f"{library} is not installed (tried to import {' and '.join(_MODULES[library])}): get it from {_FROM[library]}"
    )


def _load_shared_libraries(package: str) -> None:
    """Load the shared libraries of a wheel. The wheel's own search fails if its path contains brackets."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.so*")):
        with contextlib.suppress(OSError):  # it needs another library first, which loads it as well
            ctypes.CDLL(str(file))
