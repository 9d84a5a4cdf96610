# SPDX-License-Identifier: Apache-2.0
"""Which TensorRT `import tensorrt` means: the product for data centres, or TensorRT for RTX (consumer GPUs).

Their Python APIs agree in all that is used here, so the builder and the engine are written once, against `tensorrt`.
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
    """Make `import tensorrt` give `library`. Raises ValueError when it is not installed, or the other is in use."""
    in_use = sys.modules.get("tensorrt")
    if in_use is not None and in_use.__name__ not in _MODULES[library]:
        raise ValueError(f"got {library}, but this process uses {in_use.__name__} already: a process has one of them")
    _load_shared_libraries(f"{library}_libs")
    for name in _MODULES[library]:
        try:
            sys.modules["tensorrt"] = importlib.import_module(name)
        except ImportError:
            continue
        return
    raise ValueError(
        f"got no {library} here (tried to import {' and '.join(_MODULES[library])}), expected it from {_FROM[library]}"
    )


def _load_shared_libraries(package: str) -> None:
    """Those that a wheel has brought. It looks for them by itself, but not where a path has brackets in it."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations or []) if spec else []
    for file in sorted(file for folder in folders for file in Path(folder).glob("*.so*")):
        with contextlib.suppress(OSError):  # one of those that another needs first, and brings
            ctypes.CDLL(str(file))
