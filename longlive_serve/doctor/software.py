# SPDX-License-Identifier: Apache-2.0
"""Which packages are installed, for which use, and which Triton server. Nothing of them is imported.

Called by the command line and by the checks of the backends.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
import tomllib
from pathlib import Path

from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult, split
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.find_triton import PACKAGE_PARENT, WHEEL, TritonInstall, find_install

PROJECT = "longlive-serve"
PYPROJECT = PACKAGE_PARENT / "pyproject.toml"
STUB = "triton_python_backend_stub"


@dataclasses.dataclass(frozen=True)
class Use:
    """What an extra of pip is for."""

    extra: str
    subject: str
    purpose: str
    needed: bool = False


USES = (
    Use("torch", "serving", "to serve", needed=True),
    Use("client", "client", "for python -m longlive_client.cli.generate"),
    Use("encode", "encoding", "to send H.264 or JPEG in the place of raw frames"),
    Use("onnxruntime", "ONNX Runtime", "for backend onnxruntime"),
    Use("export", "export", "for python -m export.to_onnx"),
    Use("quantization", "quantization", "for python -m quantization.quantize"),
    Use("bench", "plots", "for --plot of the benchmarks"),
)


def version_of(package: str) -> str:
    """The installed version; empty: not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pinned() -> dict[str, dict[str, str]]:
    """The packages of every extra with the versions that were tested: of this checkout, else as installed."""
    if PYPROJECT.is_file():
        declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    else:
        declared = {}
        for line in importlib.metadata.requires(PROJECT) or ():
            requirement, _, condition = line.partition(";")
            for extra in re.findall(r"extra == ['\"](.+?)['\"]", condition):
                declared.setdefault(extra, []).append(requirement)
    exact = re.compile(r"([\w.-]+)(?:\[.*\])?==([^;\s]+)")
    found = {extra: [exact.match(requirement) for requirement in given] for extra, given in declared.items()}
    return {extra: {match[1]: match[2] for match in matches if match} for extra, matches in found.items()}


def pip_install(extra: str) -> str:
    """The command that brings an extra."""
    return f"pip install --editable '.[{extra}]'" if PYPROJECT.is_file() else f"pip install '{PROJECT}[{extra}]'"


def software() -> list[CheckResult]:
    here = f"{platform.python_version()}, {platform.system()} {platform.machine()}, {sys.executable}"
    own = f"{version_of(PROJECT) or 'not installed, run'} from {PACKAGE_PARENT}"
    results = [CheckResult(OK, "Python", here), CheckResult(OK, PROJECT, own)]
    extras = pinned()
    return results + [_use(use, extras[use.extra]) for use in USES if use.extra in extras]


def _use(use: Use, versions: dict[str, str]) -> CheckResult:
    have = {package: version_of(package) for package in versions}
    missing = [package for package, version in have.items() if not version]
    others = [
        f"{package} {version} (tested with {versions[package]})"
        for package, version in have.items()
        if version and version.partition("+")[0] != versions[package]
    ]
    if missing:
        return CheckResult(
            PROBLEM if use.needed else NOTE,
            use.subject,
            f"missing: {', '.join(missing)}",
            f"{use.purpose}: {pip_install(use.extra)}",
        )
    if others:
        return CheckResult(NOTE, use.subject, ", ".join(others), f"if something fails: {pip_install(use.extra)}")
    return CheckResult(OK, use.subject, ", ".join(f"{package} {version}" for package, version in have.items()))


def torch_cuda() -> str:
    """The version of CUDA that PyTorch was built for; empty: for none, or there is no PyTorch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    file = Path(spec.origin).with_name("version.py")
    found = re.search(
        r"^cuda\b.*=\s*['\"](.+?)['\"]", file.read_text(encoding="utf-8") if file.is_file() else "", re.MULTILINE
    )
    return found[1] if found else ""


def triton_server() -> list[CheckResult]:
    """The server that the launcher would start, and the Python that its backend embeds."""
    with tempfile.TemporaryDirectory(prefix="longlive-doctor-") as scratch:
        try:
            install = find_install(Path(scratch))
        except (ServerStartError, OSError, ImportError) as error:
            found, action = split(str(error))
            action = pip_install("triton") if "pip install" in action else action
            return [CheckResult(PROBLEM, "server", found, action or pip_install("triton"))]
        return [_server(install), _backend(install)]


def _server(install: TritonInstall) -> CheckResult:
    if install.backends is None:
        return CheckResult(OK, "server", f"{install.binary}, version {_system_version(install)}")
    have, tested = version_of(WHEEL), pinned().get("triton", {}).get(WHEEL)
    if have != tested:
        text = f"from {WHEEL} {have}, tested with {tested}"
        return CheckResult(NOTE, "server", text, f"if something fails: {pip_install('triton')}")
    return CheckResult(OK, "server", f"tritonserver of {WHEEL} {have}, in this environment")


def _system_version(install: TritonInstall) -> str:
    file = install.binary.parents[1] / "TRITON_VERSION"
    if file.is_file():
        return file.read_text(encoding="utf-8").strip()
    return os.environ.get("TRITON_SERVER_VERSION") or "unknown"


def _backend(install: TritonInstall) -> CheckResult:
    """Whether the model would be run by this version of Python, which has the packages."""
    backends = install.backends or install.binary.parents[1] / "backends"
    stub = backends / "python" / STUB
    if not stub.is_file():
        action = "take a server with the Python backend: NVIDIA's container nvcr.io/nvidia/tritonserver:YY.MM-py3"
        return CheckResult(PROBLEM, "Python backend", f"{stub} is not there", action)
    own = f"3.{sys.version_info.minor}"
    linked = re.search(rb"libpython(3\.\d+)", stub.read_bytes())
    if linked is None:
        action = f"see to it that the model runs in Python {own}, where the packages are"
        return CheckResult(WARNING, "Python backend", f"{stub} does not say which Python it runs", action)
    version = linked[1].decode()
    if version != own:
        text = f"it runs Python {version}, but the packages looked for here are those of Python {own}"
        return CheckResult(PROBLEM, "Python backend", text, f"install them for python{version}, and run this with it")
    return CheckResult(OK, "Python backend", f"runs the model in Python {version}, like this one")
