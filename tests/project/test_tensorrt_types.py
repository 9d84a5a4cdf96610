# SPDX-License-Identifier: Apache-2.0
"""The type check against TensorRT's API detects calls that a version does not have."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.project.tensorrt_types import VERSIONS, check, stubs, valid

OLD, NEW = VERSIONS
FP16 = "config.set_flag(trt.BuilderFlag.FP16)"
OLD_CALL = "context.execute_async_v2([], 0)"
RIGHT = "config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)"


@pytest.fixture(scope="module", autouse=True)
def types() -> None:
    missing = [f"{name} (extra `dev`)" for name in ("pybind11_stubgen", "mypy") if find_spec(name) is None]
    missing += [] if shutil.which("gcc") else ["gcc (Debian, Ubuntu: apt-get install gcc)"]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    for version in VERSIONS:
        try:
            stubs(version)
        except RuntimeError as error:
            pytest.skip(f"needs TensorRT's bindings, which pip fetches: {error}")


@pytest.mark.parametrize(
    ("code", "version", "said"),
    [
        (RIGHT, OLD, ""),
        (RIGHT, NEW, ""),
        (FP16, OLD, ""),
        (FP16, NEW, 'has no attribute "FP16"'),
        (OLD_CALL, OLD, 'has no attribute "execute_async_v2"'),
        (OLD_CALL, NEW, 'has no attribute "execute_async_v2"'),
        ("config.set_flag(1.5)", NEW, 'expected "BuilderFlag"'),
    ],
)
def test_a_call_that_a_version_does_not_have_is_seen(tmp_path: Path, code: str, version: str, said: str) -> None:
    snippet = tmp_path / "snippet.py"
    arguments = "config: trt.IBuilderConfig, context: trt.IExecutionContext"
    snippet.write_text(f"import tensorrt as trt\n\n\ndef use({arguments}) -> None:\n    {code}\n")
    done = check(version, snippet)
    assert said in done.stdout
    assert (done.returncode == 0) == (not said), done.stdout + done.stderr


def test_a_declaration_that_is_no_python_takes_anything() -> None:
    text = "class A:\n    def f(self, in: int) -> int:\n        ...\n    def g(self) -> int: ...\n"
    assert "def f(self, *args: typing.Any, **kwargs: typing.Any)" in valid(text)
    assert "def g(self) -> int: ..." in valid(text)
    with pytest.raises(SyntaxError):
        valid("class A:\n    x = = 1\n")
