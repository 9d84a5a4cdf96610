# SPDX-License-Identifier: Apache-2.0
"""Triton as a group of processes: whether they live, and the promise that nothing of them is left behind.

Called by `launcher.py`. It knows neither Triton's options nor its protocols.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longlive_serve.triton_server.log_reader import TritonLog

# Waits until this process writes a line or is gone, however it went; then ends the group ($1), and removes the scratch
# folder ($2) and the shared memory whose names begin with $3. Triton's own stub survives a killed Triton.
_GUARD = 'read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"; rm -f -- "$3"*'


class ProcessGroup:
    """A command with its children, its scratch folder and its shared memory, which all end together.

    They end with `close`, or with this process even if it is killed: a small shell outside the group sees to it.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        working_directory: Path,
        scratch: Path,
        shm_prefix: Path,
        echo: bool,
        rename: Callable[[str], str] = str,
    ) -> None:
        """`echo`, `rename`: of the log."""
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=working_directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a Ctrl-C in the terminal comes to this process only
        )
        self._guard: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["/bin/sh", "-c", _GUARD, "longlive-guard", str(self.process.pid), str(scratch), str(shm_prefix)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.log = TritonLog(self.process.stdout, echo, rename)

    def send_signal(self, number: signal.Signals) -> None:
        if self._guard is not None:  # else the number of the group may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def lost_child(self) -> str:
        """How a process that Triton has started has ended, which Triton has not asked about; empty: there is none.

        The model runs in one. Triton waits for it for ever, and stays ready without it. Before it, Triton tries out
        whether such a process starts, and asks at once how that ended.
        """
        return next(filter(None, map(_end_of, _children_of(self.process.pid))), "")

    def close(self) -> None:
        """Kill what still runs and remove what is left; the log stays readable. May be called again."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.communicate(b"\n")
            self.process.wait()
            self.log.finish()


def _children_of(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has ended meanwhile
            found |= set(map(int, task.read_text(encoding="ascii").split()))
    return found


def _end_of(pid: int) -> str:
    """How a process has ended that its parent has not asked about; empty: it lives, or its parent has."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return ""
    if fields[0] != "Z":
        return ""
    status = int(fields[49])  # as wait() has it; see proc_pid_stat(5)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {one.value: one.name for one in signal.Signals}
        return f"was killed by {names.get(number, number)}"
    return f"ended with exit status {os.WEXITSTATUS(status)}"
