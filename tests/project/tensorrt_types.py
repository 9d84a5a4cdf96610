# SPDX-License-Identifier: Apache-2.0
"""Type-checks our TensorRT code against each supported version: `python -m tests.project.tensorrt_types`.

TensorRT itself is not needed: its Python bindings are separate wheels, which import with three empty libraries (built
with gcc) instead of TensorRT's. pybind11-stubgen generates stubs from them, and mypy checks our code with these. The
files stay in the user's cache folder, because NVIDIA owns the bindings and the stubs.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "longlive-serve", "tensorrt_types")
VERSIONS = ("10.16.1.11", "11.4.0.106")
CHECKED = ("export", "longlive_serve/backends/exported/tensorrt_session.py")

_POINTERS = {
    "libnvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "libnvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
    "libnvinfer_plugin": ("initLibNvInferPlugins",),
}
"""Functions that the bindings import from each library; they return 0, as nothing is built or run."""
_DEF = re.compile(r"(\s*)def (\w+)\(.*?:( \.\.\.)?$")
_ANYTHING = r"\1def \2(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:\3"
_PACKAGE = "\n__version__: str\n"
"""Additions of the package `tensorrt` to its bindings."""
_BUFFER = "    def __buffer__(self, flags: int, /) -> memoryview: ...\n"


def stubs(version: str) -> Path:
    """A folder for MYPYPATH with the stubs of this TensorRT version; created if missing."""
    folder = HOME / version
    if not (folder / "tensorrt.pyi").exists():
        HOME.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=HOME) as made:
            text = _declarations(_bindings(version, Path(made)))
        folder.mkdir(exist_ok=True)
        partial = folder / f"tensorrt.{os.getpid()}"
        partial.write_text(text)
        partial.replace(folder / "tensorrt.pyi")
    return folder


def _bindings(version: str, folder: Path) -> Path:
    """Unpack the bindings' wheel and build the empty libraries."""
    pip = ["pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    _run(sys.executable, "-m", *pip, "--dest", str(folder), f"tensorrt-cu13-bindings=={version}")
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    for library, functions in _POINTERS.items():
        source = folder / f"{library}.c"
        source.write_text("".join(f"void *{function}(void) {{ return 0; }}\n" for function in functions))
        name = f"{library}.so.{version.partition('.')[0]}"
        built = folder / "tensorrt_bindings" / name
        _run("gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(built), str(source))
    return folder


def _declarations(folder: Path) -> str:
    """Stubs of the module that mypy accepts."""
    module = "tensorrt_bindings.tensorrt"
    arguments = ["-m", "pybind11_stubgen", "--ignore-all-errors", "--output-dir", str(folder), module]
    _run(sys.executable, *arguments, env=os.environ | {"PYTHONPATH": str(folder)})
    text = folder.joinpath(*module.split(".")).with_suffix(".pyi").read_text(encoding="utf-8").replace(f"{module}.", "")
    text = re.sub(r"(class IHostMemory:\n)", rf"\1{_BUFFER}", text)
    return "# mypy: ignore-errors\n" + valid(text) + _PACKAGE


def valid(text: str) -> str:
    """Replace every `def` with a syntax error (an argument called `in`) by one with arbitrary arguments."""
    lines = text.split("\n")
    while True:
        try:
            ast.parse("\n".join(lines))
        except SyntaxError as error:
            number = (error.lineno or 1) - 1
            mended = _DEF.sub(_ANYTHING, lines[number])
            if mended == lines[number]:
                raise
            lines[number] = mended
        else:
            return "\n".join(lines)


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")


def check(version: str, *paths: str | Path) -> subprocess.CompletedProcess[str]:
    """Run mypy on `paths` with the stubs of this version and the settings of pyproject.toml."""
    folder = stubs(version)
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "mypy"), *map(str, paths)]
    env = os.environ | {"MYPYPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)


def main() -> int:
    failed = False
    for version in VERSIONS:
        done = check(version, *CHECKED)
        print(f"TensorRT {version}: {done.stdout.strip()}{done.stderr.strip()}")
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
