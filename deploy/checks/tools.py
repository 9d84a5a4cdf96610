# SPDX-License-Identifier: Apache-2.0
"""Third-party commands of the checks: on PATH, beside this Python, or downloaded to the user's cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "longlive-serve", "deploy-tools")
FETCHED = ("kustomize", "promtool", "docker-compose")


def find(name: str) -> str | None:
    """The path of a command; None if it is not installed."""
    folders = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", str(CACHE)]
    return shutil.which(name, path=os.pathsep.join(folders))


def kustomize() -> list[str] | None:
    """The command that renders a folder."""
    if (alone := find("kustomize")) is not None:
        return [alone, "build"]
    kubectl = find("kubectl")
    return None if kubectl is None else [kubectl, "kustomize"]


def compose() -> list[str] | None:
    """The command that reads a compose file; it needs no daemon."""
    if (alone := find("docker-compose")) is not None:
        return [alone]
    docker = find("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        return None
    return [docker, "compose"]


def fetch_missing() -> None:
    """Download missing commands; if that fails, the checks that need them are skipped."""
    missing = [name for name in FETCHED if find(name) is None]
    if kustomize() is not None and "kustomize" in missing:
        missing.remove("kustomize")
    if compose() is not None and "docker-compose" in missing:
        missing.remove("docker-compose")
    if missing and shutil.which("dpkg-deb"):
        print(f"fetching {', '.join(missing)} to {CACHE} ...", file=sys.stderr)
        subprocess.run(["sh", str(Path(__file__).with_suffix(".sh")), str(CACHE), *missing], check=False)
