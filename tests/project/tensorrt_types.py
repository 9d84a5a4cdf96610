# SPDX-License-Identifier: Apache-2.0
"""Our TensorRT code against the real API of each supported version: `python -m tests.project.tensorrt_types`.

TensorRT itself is not needed: its Python bindings are wheels of their own, and import once three empty libraries (made
with gcc) stand where TensorRT's would be. pybind11-stubgen writes down what they declare, mypy checks our code with it.
All that lies in the user's cache folder: the bindings and what is made of them are NVIDIA's.
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
"""What the bindings take from each library; all of it may return 0, as nothing is built or run."""
_DEF = re.compile(r"(\s*)def (\w+)\(.*?:( \.\.\.)?$")
_ANYTHING = r"\1def \2(self, *args: typing.Any, **kwargs: typing.Any) -> typing.Any:\3"
_PACKAGE = "\n__version__: str\n"
"""What the package `tensorrt` adds to the module of its bindings."""
_BUFFER = "    def __buffer__(self, flags: int, /) -> memoryview: ...\n"


def stubs(version: str) -> Path:
    """A folder for MYPYPATH with the types of `tensorrt` in this version; made when it is not there."""
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
    """The bindings' wheel, unpacked, with empty libraries to load."""
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
    """The types of the module, as mypy takes them."""
    module = "tensorrt_bindings.tensorrt"
    arguments = ["-m", "pybind11_stubgen", "--ignore-all-errors", "--output-dir", str(folder), module]
    _run(sys.executable, *arguments, env=os.environ | {"PYTHONPATH": str(folder)})
    text = folder.joinpath(*module.split(".")).with_suffix(".pyi").read_text(encoding="utf-8").replace(f"{module}.", "")
    text = re.sub(r"(class IHostMemory:\n)", rf"\1{_BUFFER}", text)
    return "# mypy: ignore-errors\n" + valid(text) + _PACKAGE


def valid(text: str) -> str:
    """`text`, with every `def` that is no Python (an argument called `in`) as one that takes anything."""
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
    """mypy, set up as in pyproject.toml, over `paths`, with the types of this version."""
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
