# SPDX-License-Identifier: Apache-2.0
"""Installed packages by use, and the Triton server. None of them is imported.

Called by the command line and by the checks of the backends.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import tomllib
from pathlib import Path

from longlive_serve.doctor.check_result import ERROR, NOTE, OK, WARNING, CheckResult, split_error
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.find_triton import PACKAGE_PARENT, WHEEL, TritonInstall, find_install

PROJECT = "longlive-serve"
PYPROJECT = PACKAGE_PARENT / "pyproject.toml"
STUB = "triton_python_backend_stub"
SERVING = "torch"
EXTRAS = {  # the extras of pip: a name, and what needs it
    SERVING: ("serving", "to serve"),
    "client": ("client", "for python -m longlive_client.cli.generate"),
    "encode": ("encoding", "to send H.264 or JPEG instead of raw frames"),
    "onnxruntime": ("ONNX Runtime", "for the backend onnxruntime"),
    "export": ("export", "for python -m export.to_onnx"),
    "quantization": ("quantization", "for python -m quantization.quantize"),
    "bench": ("plots", "for --plot of the benchmarks"),
}


def version_of(package: str) -> str:
    """The installed version; empty: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pinned_versions() -> dict[str, dict[str, str]]:
    """The tested version of each package, by extra: from the checkout, else from the installed project."""
    if PYPROJECT.is_file():
        extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    else:
        extras = {}
        for line in importlib.metadata.requires(PROJECT) or ():
            requirement, _, condition = line.partition(";")
            for extra in re.findall(r"extra == ['\"](.+?)['\"]", condition):
                extras.setdefault(extra, []).append(requirement)
    pattern = re.compile(r"([\w.-]+)(?:\[.*\])?==([^;\s]+)")
    matches = {extra: map(pattern.match, requirements) for extra, requirements in extras.items()}
    return {extra: {match[1]: match[2] for match in found if match} for extra, found in matches.items()}


def pip_install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install --editable '.[{extra}]'" if PYPROJECT.is_file() else f"pip install '{PROJECT}[{extra}]'"


def check_software() -> list[CheckResult]:
    python = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    project = f"{version_of(PROJECT) or 'not installed, run'} from {PACKAGE_PARENT}"
    results = [CheckResult(OK, "Python", python), CheckResult(OK, PROJECT, project)]
    pinned = pinned_versions()
    return results + [_check_extra(extra, pinned[extra]) for extra in EXTRAS if extra in pinned]


def _check_extra(extra: str, pinned: dict[str, str]) -> CheckResult:
    name, use = EXTRAS[extra]
    versions = {package: version_of(package) for package in pinned}
    if missing := [package for package, version in versions.items() if not version]:
        level = ERROR if extra == SERVING else NOTE
        return CheckResult(level, name, f"missing: {', '.join(missing)}", f"{use}: {pip_install(extra)}")
    untested = [
        f"{package} {version} (tested with {pinned[package]})"
        for package, version in versions.items()
        if version.partition("+")[0] != pinned[package]
    ]
    if untested:
        return CheckResult(NOTE, name, ", ".join(untested), f"if something fails: {pip_install(extra)}")
    return CheckResult(OK, name, ", ".join(f"{package} {version}" for package, version in versions.items()))


def torch_cuda() -> str:
    """The version of CUDA that PyTorch was built for; empty: none, or PyTorch is not installed."""
    spec = importlib.util.find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec is not None and spec.origin is not None else None
    text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
    match = re.search(r"^cuda\b.*=\s*['\"](.+?)['\"]", text, re.MULTILINE)
    return match[1] if match else ""


def check_triton() -> list[CheckResult]:
    """The server that the launcher would start, and the Python that its backend embeds."""
    with tempfile.TemporaryDirectory(prefix="longlive-doctor-") as scratch:
        try:
            install = find_install(Path(scratch))
        except (ServerStartError, OSError, ImportError) as error:
            message, action = split_error(str(error))
            action = pip_install("triton") if "pip install" in action or not action else action
            return [CheckResult(ERROR, "server", message, action)]
        return [_check_server(install), _check_python_backend(install)]


def _check_server(install: TritonInstall) -> CheckResult:
    if install.backends is None:
        path = install.binary.parents[1] / "TRITON_VERSION"
        version = path.read_text(encoding="utf-8") if path.is_file() else os.environ.get("TRITON_SERVER_VERSION")
        return CheckResult(OK, "server", f"{install.binary}, version {(version or 'unknown').strip()}")
    version, pinned = version_of(WHEEL), pinned_versions().get("triton", {}).get(WHEEL)
    if version != pinned:
        message = f"from {WHEEL} {version}, tested with {pinned}"
        return CheckResult(NOTE, "server", message, f"if something fails: {pip_install('triton')}")
    return CheckResult(OK, "server", f"tritonserver of {WHEEL} {version}, in this environment")


def _check_python_backend(install: TritonInstall) -> CheckResult:
    """Whether it runs the model in this version of Python, which has the packages."""
    name, own = "Python backend", f"3.{sys.version_info.minor}"
    stub = (install.backends or install.binary.parents[1] / "backends") / "python" / STUB
    if not stub.is_file():
        action = "use a server with the Python backend: NVIDIA's container nvcr.io/nvidia/tritonserver:YY.MM-py3"
        return CheckResult(ERROR, name, f"{stub} not found", action)
    match = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
    version = match[1].decode() if match else "unknown"
    if version == own:
        return CheckResult(OK, name, f"runs the model in Python {version}, like this one")
    message = f"runs the model in Python {version}, but the packages were checked in Python {own}"
    action = f"run this with Python {version}, with the packages installed there"
    return CheckResult(ERROR if match else WARNING, name, message, action)
