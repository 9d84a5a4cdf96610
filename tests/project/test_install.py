# SPDX-License-Identifier: Apache-2.0
"""Set-up: the check of the interpreter, make's choice of Python, the locked requirements."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server import find_triton, python_version
from longlive_serve.triton_server.python_version import InterpreterError

ROOT = Path(__file__).resolve().parents[2]
LOCKS = {"py311": ("torch", "client", "triton"), "py312": ("torch", "client", "triton"), "py313": ("client",)}


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A Python without its shared library."""
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_config_var", lambda name: str(tmp_path))
    monkeypatch.setattr(python_version, "VERSION", (3, 99))
    return tmp_path


def test_this_python_can_run_the_server() -> None:
    python_version.check()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ((3, 10), r"got Python 3\.10, expected 3\.11 or 3\.12; make PYTHON=python3\.12 "),
        (
            (3, 13),
            r"got Python 3\.13, expected 3\.11 or 3\.12: .* compiled for NumPy 1 .* no wheels for newer ones; make",
        ),
    ],
)
def test_other_pythons_are_refused_with_the_reason(
    version: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_version, "VERSION", version)
    with pytest.raises(InterpreterError, match=message):
        python_version.check()


def test_a_python_that_cannot_make_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InterpreterError, match=r"no module ensurepip, .*; apt-get install python3\.\d+-venv"):
        python_version.check()


def test_the_server_says_which_package_brings_the_library_of_python(no_library: Path) -> None:
    with pytest.raises(
        ServerStartError, match=r"got no libpython3\.99\.so\.1\.0, .*; apt-get install libpython3\.99, or "
    ):
        find_triton._find_libpython()


def test_the_library_is_found_where_python_was_moved_to(no_library: Path) -> None:
    library = no_library / "lib/libpython3.99.so.1.0"
    library.parent.mkdir()
    library.write_bytes(b"")
    assert python_version.find_libpython() == library


def test_the_library_is_left_to_the_loader_that_finds_it(no_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python_version, "ctypes", SimpleNamespace(CDLL=lambda name: None))
    assert python_version.find_libpython() is None


def python(file: Path, version: str, can_serve: bool) -> Path:
    """A fake interpreter that answers the Makefile's queries: its version, and whether it can run the server."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\ncase $1 in -m) exit {int(not can_serve)};; esac\necho '{version}'\n", encoding="utf-8")
    file.chmod(0o755)
    return file


def planned(*words: str, path: Path | None = None) -> str:
    """The output of `make --dry-run setup`."""
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHON", "MAKEFLAGS", "MAKELEVEL"}
    }
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    command = ["make", "--no-print-directory", "--dry-run", "setup", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_takes_a_newer_python_where_python3_is_too_old(tmp_path: Path) -> None:
    python(tmp_path / "bin/python3", "(3, 10)", False)
    python(tmp_path / "bin/python3.12", "(3, 12)", True)
    assert "python3.12 -m venv" in planned(f"VENV={tmp_path / 'venv'}", path=tmp_path / "bin")


def test_make_says_what_is_wrong_with_python3_where_no_python_fits(tmp_path: Path) -> None:
    for name in ("python3", "python3.12", "python3.11"):
        python(tmp_path / "bin" / name, "(3, 10)", False)
    assert planned(f"VENV={tmp_path / 'venv'}", path=tmp_path / "bin").startswith(
        "python3 -m longlive_serve.triton_server.python_version"
    )


def test_an_environment_of_another_python_makes_way_for_the_one_asked_for(tmp_path: Path) -> None:
    asked, venv = python(tmp_path / "asked", "(3, 12)", True), tmp_path / "venv"
    python(venv / "bin/python", "(3, 11)", True)
    (venv / ".complete").touch()
    words = f"VENV={venv}", f"PYTHON={asked}"
    assert f"{asked} -m venv --clear {venv}" in planned(*words)
    python(venv / "bin/python", "(3, 12)", True)
    assert "Nothing to be done" in planned(*words)


def test_an_environment_stays_when_no_python_is_asked_for(tmp_path: Path) -> None:
    python(tmp_path / "venv/bin/python", "(3, 99)", True)
    (tmp_path / "venv/.complete").touch()
    assert "Nothing to be done" in planned(f"VENV={tmp_path / 'venv'}")


@pytest.mark.parametrize("name", LOCKS)
def test_what_is_locked_is_what_the_project_asks_for(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    locked = [Requirement(line.removesuffix("\\")) for line in lines if line[0].isalpha()]
    versions = {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in locked}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    # hatchling asks for editables when it runs, for `pip install --editable`
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"], "editables"]
    asked += [line for extra in LOCKS[name] for line in project["project"]["optional-dependencies"][extra]]
    stale = [line for line in asked if not in_lock(Requirement(line), versions)]
    assert not stale, "run `make lock`"


def in_lock(requirement: Requirement, versions: Mapping[NormalizedName, str]) -> bool:
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and version in requirement.specifier


@pytest.mark.parametrize("name", LOCKS)
def test_locked_requirements_say_what_and_not_where_from(name: str) -> None:
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith(("#", "    --hash=sha256:")) or Requirement(line.removesuffix("\\")).url is None
        assert "://" not in line
