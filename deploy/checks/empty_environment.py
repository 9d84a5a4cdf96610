# SPDX-License-Identifier: Apache-2.0
"""Executes deploy/Dockerfile.cpu without Docker: `python -m deploy.checks.empty_environment`. Takes minutes and 2 GB.

The file's own commands install the wheel and packages into an empty environment; its layout is copied to a folder. The
entry command starts the server; run by root, it is sandboxed as in Kubernetes: user 10001, no privileges, only /tmp and
/dev/shm writable. Then the health check runs, a client plays a video, and SIGTERM stops the server. Exit code 0 if all
of this works.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from deploy.checks.dockerfiles import ROOT, Stage, load_stages
from longlive_client.video_stream import VideoStream

DOCKERFILE = ROOT / "deploy/Dockerfile.cpu"
HOME = "/opt/longlive"  # in the image
CHUNKS = 4
USER = "10001"
# $1: the image's folder. Only /tmp and /dev/shm are writable, as in the pod. $MAY: a capability to keep.
_SANDBOX = f"""
set -e
mount --make-rprivate /
mount --rbind / /
mount -o remount,bind,ro /
mount -t tmpfs -o size=1g tmpfs /tmp
mount -t tmpfs -o size=256m tmpfs /dev/shm
cd "$1"
shift
exec setpriv --reuid {USER} --regid {USER} --clear-groups --no-new-privs \\
  --inh-caps=-all$MAY --ambient-caps=-all$MAY --bounding-set=-all$MAY -- "$@"
"""


class Image:
    """The image's layout in a folder: `/opt/longlive` of the Dockerfile is `folder`/opt/longlive here."""

    def __init__(self, folder: Path, dockerfile: Path) -> None:
        self._folder = folder
        self._stages = load_stages(dockerfile)
        self.home = Path(self._in_folder(HOME))
        self.final = self._stages[-1]

    def build(self) -> None:
        for stage in self._stages:
            self._copy(stage)
            for run in stage.all("RUN"):
                if "useradd" not in run.text:  # do not create users on this machine
                    self._run(self._in_folder(run.text), stage)

    def environment(self) -> dict[str, str]:
        """The container's environment; of this process's only the number of threads."""
        variables = {name: self._in_folder(value) for name, value in self.final.environment().items()}
        variables["PATH"] = variables["PATH"].replace("$PATH", "/usr/local/bin:/usr/bin:/bin")
        return variables | {"HOME": "/tmp", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    @property
    def entry(self) -> list[str]:
        entry = self.final.last("ENTRYPOINT")
        assert entry is not None
        return [self._in_folder(word) for word in entry.words]

    @property
    def health_check(self) -> list[str]:
        check = self.final.last("HEALTHCHECK")
        assert check is not None
        return [self._in_folder(word) for word in json.loads(check.text.partition("CMD ")[2])]

    def run(self, command: Sequence[str]) -> None:
        """Run a command as in the container."""
        subprocess.run(command, cwd=self.home, env=self.environment(), check=True)

    def _copy(self, stage: Stage) -> None:
        workdir = stage.last("WORKDIR")
        for copy in stage.copies:
            if copy.stage:
                continue  # all stages share the folder
            assert workdir is not None
            target = Path(self._in_folder(workdir.text), copy.target)
            for source in copy.sources:
                path = ROOT / source
                if path.is_dir():
                    shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
                else:
                    into = target / path.name if copy.target.endswith("/") or len(copy.sources) > 1 else target
                    into.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, into)

    def _run(self, command: str, stage: Stage) -> None:
        workdir = stage.last("WORKDIR")
        cwd = Path(self._in_folder(workdir.text if workdir else "/"))
        Path(self._in_folder("/wheels")).mkdir(exist_ok=True)
        self.home.mkdir(parents=True, exist_ok=True)
        build_args = {name: value for name, value in stage.arguments().items() if value}
        python = Path(sys.base_prefix, "bin")  # stands for the base image's Python
        environment = os.environ | build_args | {"PATH": f"{python}{os.pathsep}{os.environ['PATH']}"}
        environment |= {"PIP_QUIET": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment.pop("VIRTUAL_ENV", None)
        subprocess.run(["sh", "-euc", command], cwd=cwd, env=environment, check=True)

    def _in_folder(self, text: str) -> str:
        return re.sub(r"(?<![\w.])/(opt/longlive|wheels|source)\b", rf"{self._folder}/\1", text)


def can_sandbox() -> bool:
    if os.geteuid() or not (shutil.which("unshare") and shutil.which("setpriv")):
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def running(image: Image, sandboxed: bool) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """Run the image's entry command; yields the process, its gRPC address and its metrics address."""
    command = image.entry + [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    environment = image.environment()
    if sandboxed:
        # If Python is installed in root's home, unlike in an image, the other user needs access to it.
        prefix = Path(sys.base_prefix)
        hidden = any(not folder.stat().st_mode & 0o001 for folder in (prefix, *prefix.parents))
        environment["MAY"] = ",+dac_read_search" if hidden else ""
        command = ["unshare", "--mount", "sh", "-c", _SANDBOX, "shut-in", str(image.home), *command]
    process = subprocess.Popen(command, cwd=image.home, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = _read_ready_line(process.stdout)
        found = re.search(r"gRPC (\S+), HTTP \S+, metrics (\S+)/metrics", ready)
        if found is None:
            raise RuntimeError(f"the server did not start: {ready!r}")
        yield process, found[1], found[2]
    finally:
        process.kill()
        process.wait()


def _read_ready_line(output: IO[str]) -> str:
    return next((line for line in output if line.startswith("ready:")), "")


def play_video(url: str) -> int:
    """Play a video with a prompt switch; returns its frames."""
    frames = 0
    with VideoStream("A red circle drifts right.", url=url, seed=1, chunks=CHUNKS, pace="asap", resume_for=0) as video:
        video.switch_prompt("A blue square glides left.", at_latent_frame=3)
        for chunk in video.chunks():
            frames += len(chunk.frames)
    return frames


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that other users can read, outside of /tmp, which is empty in the sandbox."""
    with tempfile.TemporaryDirectory(prefix="longlive-image-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def build_and_serve(folder: Path, dockerfile: Path = DOCKERFILE) -> str:
    """Build and serve in `folder`; returns a summary. Raises RuntimeError or CalledProcessError."""
    image, start = Image(folder, dockerfile), time.monotonic()
    image.build()
    built = time.monotonic() - start
    sandboxed = can_sandbox()
    start = time.monotonic()
    with running(image, sandboxed) as (process, grpc_url, metrics_url):
        started = time.monotonic() - start
        image.run([*image.health_check, f"--url={grpc_url}"])
        frames = play_video(grpc_url)
        if frames != 12 * CHUNKS - 3:
            raise RuntimeError(f"got {frames} frames, expected {12 * CHUNKS - 3}")
        image.run(["python3", "-m", "deploy.drain", f"--url=http://{metrics_url}/metrics", "--for=5", "--settle=0"])
        process.send_signal(signal.SIGTERM)
        status = process.wait(30)
        if status:
            raise RuntimeError(f"the server ended with {status} after SIGTERM, expected 0")
    mode = f"as user {USER} on a read-only root" if sandboxed else "as this user, without the sandbox (it needs root)"
    return f"built in {built:.0f} s, ready in {started:.1f} s, {frames} frames served, {mode}; exit code 0"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.checks.empty_environment", description=__doc__)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="build in this folder and keep it")
    args = parser.parse_args(argv)
    try:
        with contextlib.ExitStack() as stack:
            folder = args.keep or stack.enter_context(temporary_folder())
            folder.mkdir(parents=True, exist_ok=True)
            print(build_and_serve(folder.absolute()))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
