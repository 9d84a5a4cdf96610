# SPDX-License-Identifier: Apache-2.0
"""Finds a Triton server on this machine, and sets up the environment in which its Python backend imports this package.

Called by `launcher.py` and by the doctor. It starts nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.python_version import NUMPY_1, InterpreterError, find_libpython
from longlive_serve.triton_server.safe_paths import SafePaths

SYSTEM_SERVER = Path("/opt/tritonserver/bin/tritonserver")  # in NVIDIA's container
WHEEL = "nvidia-pytriton"
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TritonInstall:
    """A server to start. `backends` is None where the server finds them itself."""

    binary: Path
    backends: Path | None = None
    library_dirs: tuple[Path, ...] = ()

    def environment(self, paths: SafePaths, python: Path) -> dict[str, str]:
        """This process's environment, changed for the server and for the Python that its backend embeds.

        `python`: the folder of the `python3` whose packages the model imports.
        """
        environment = dict(os.environ)
        # From Python 3.11 on the embedded interpreter ignores PYTHONPATH and takes the environment of the first
        # `python3` on PATH; older ones and other builds of the backend read PYTHONPATH.
        _prepend(environment, "PATH", python)
        packages = (PACKAGE_PARENT, Path(sysconfig.get_path("purelib")))
        _prepend(environment, "PYTHONPATH", *map(paths.safe, packages))
        if self.library_dirs:
            _prepend(environment, "LD_LIBRARY_PATH", *map(paths.safe, self.library_dirs))
        environment.pop("PYTHONHOME", None)
        return environment


def find_install(scratch: Path) -> TritonInstall:
    """The `tritonserver` of this machine if there is one, else the wheel's, linked together in `scratch`.

    Raises ServerStartError.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return TritonInstall(binary=Path(on_path).resolve())
    if SYSTEM_SERVER.is_file():
        return TritonInstall(binary=SYSTEM_SERVER)
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerStartError(
            f"no Triton server: looked for `tritonserver` on PATH, for {SYSTEM_SERVER} and for the wheel {WHEEL}; "
            "pip install 'longlive-serve[triton]'"
        )
    return _link_wheel(Path(spec.origin).parent, scratch)


def _link_wheel(pytriton: Path, scratch: Path) -> TritonInstall:
    """Link the wheel's Python backend and the stub for this Python into one folder, as Triton expects them."""
    _check_numpy()
    server = pytriton / "tritonserver"
    backend = scratch / "backends" / "python"
    backend.mkdir(parents=True)
    for file in (server / "backends" / "python").iterdir():
        if file.is_file():
            (backend / file.name).symlink_to(file)
    stub = _find_stub(server / "python_backend_stubs")
    (backend / stub.name).symlink_to(stub)
    libraries = scratch / "lib"
    libraries.mkdir()
    libpython = _find_libpython()
    if libpython is not None:  # linked alone: its folder may hold other libraries that Triton must not see
        (libraries / libpython.name).symlink_to(libpython)
    return TritonInstall(
        binary=server / "bin" / "tritonserver",
        backends=backend.parent,
        library_dirs=(pytriton.parent / "nvidia_pytriton.libs", libraries),
    )


def _check_numpy() -> None:
    version = importlib.metadata.version("numpy")
    if int(version.split(".", 1)[0]) >= 2:
        raise ServerStartError(
            f"numpy: got {version}, expected below 2: {NUMPY_1}; "
            "with Python 3.11 or 3.12: pip install 'longlive-serve[triton]'"
        )


def _find_stub(folder: Path) -> Path:
    """The backend's interpreter for this version of Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = folder / version / "triton_python_backend_stub"
    if not stub.is_file():
        available = sorted((path.name for path in folder.iterdir()), key=lambda name: int(name.partition(".")[2]))
        raise ServerStartError(
            f"Python {version}: {WHEEL} has no backend stub for it, only for {', '.join(available)}; "
            "run the server with one of those"
        )
    return stub


def _find_libpython() -> Path | None:
    """The shared library that the stub links; None: the system's loader finds it."""
    try:
        return find_libpython()
    except InterpreterError as error:
        raise ServerStartError(str(error)) from None


def _prepend(environment: dict[str, str], name: str, *folders: Path) -> None:
    values = [str(folder) for folder in folders]
    if environment.get(name):
        values.append(environment[name])
    environment[name] = os.pathsep.join(values)
