# SPDX-License-Identifier: Apache-2.0
"""A group of processes, its scratch folder and its shared memory, which are all removed at the end.

Called by `launcher.py`. It does not know Triton's options and protocols.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from longlive_serve.triton_server.log_reader import TritonLog

# Waits until this process writes a line or ends, even by SIGKILL. Then it kills the group ($1), and removes the scratch
# folder ($2) and the shared memory with the prefix $3. The group is needed: Triton's stub survives a killed Triton.
_CLEANUP = 'read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"; rm -f -- "$3"*'


class ProcessGroup:
    """A command with its children, its scratch folder and its shared memory.

    `close` removes them all. A shell outside the group does so as well when this process ends or is killed.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        folder: Path,
        scratch: Path,
        shm_prefix: Path,
        verbose: bool,
        rename: Callable[[str], str] = str,
    ) -> None:
        """`verbose`, `rename`: see `TritonLog`."""
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal must only reach this process
        )
        self._cleanup: subprocess.Popen[bytes] | None = subprocess.Popen(
            ["/bin/sh", "-c", _CLEANUP, "longlive-cleanup", str(self.process.pid), str(scratch), str(shm_prefix)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.log = TritonLog(self.process.stdout, verbose, rename)

    def send_signal(self, number: signal.Signals) -> None:
        if self._cleanup is not None:  # else another group may have got this number
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def dead_child(self) -> str:
        """How a child of Triton has ended for which Triton has not called wait(); empty: there is none.

        The model runs in such a child. When it dies, Triton waits for it forever and still reports ready. At its start
        Triton also runs a probe, a child that only shows whether such a process starts, and soon waits for it.
        """
        return next(filter(None, map(_exit_of, _children_of(self.process.pid))), "")

    def close(self) -> None:
        """Kill all processes and remove all files. The log can still be read. May be called more than once."""
        cleanup, self._cleanup = self._cleanup, None
        if cleanup is not None:
            cleanup.communicate(b"\n")
            self.process.wait()
            self.log.finish()


def _children_of(pid: int) -> set[int]:
    pids: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # the thread has ended in the meantime
            pids |= set(map(int, task.read_text(encoding="ascii").split()))
    return pids


def _exit_of(pid: int) -> str:
    """How a process has ended, if its parent has not called wait() for it; else empty."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except OSError:
        return ""
    if fields[0] != "Z":
        return ""
    status = int(fields[49])  # as from wait(); see proc_pid_stat(5)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        names = {sig.value: sig.name for sig in signal.Signals}
        return f"was killed by {names.get(number, number)}"
    return f"ended with exit status {os.WEXITSTATUS(status)}"
