# SPDX-License-Identifier: Apache-2.0
"""Triton as a group of processes: its ports, its log, and the promise that nothing of it is left behind.

Called by `server.py`. It knows neither Triton's options nor its protocols.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from longlive_serve.triton_install import ServerError

PORT_NAMES = {"grpc": "gRPC", "http": "HTTP", "metrics": "metrics"}

# Waits until this process writes a line or is gone, however it went; then ends the group ($1), and removes the scratch
# folder ($2) and the shared memory whose names begin with $3. Triton's own stub survives a killed Triton.
_GUARD = 'read -r _; kill -s KILL -- "-$1"; rm -rf -- "$2"; rm -f -- "$3"*'


def choose_ports(host: str, ports: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """The address of `host` and the ports with each 0 replaced by a free one. Raises ServerError."""
    try:
        address = socket.gethostbyname(host)
    except OSError as error:
        raise ServerError(f"host: got {host!r}, expected an address of this machine ({error})") from None
    given = [port for port in ports.values() if port]
    if len(set(given)) < len(given):
        raise ServerError(f"ports: got {dict(ports)}, expected three different ones")
    chosen = {}
    with contextlib.ExitStack() as stack:  # all stay bound until the last is chosen, so that they differ
        for name, port in ports.items():
            listener = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((address, port))
                listener.listen()  # with SO_REUSEADDR, only listening tells a free port from one in use
            except (OSError, OverflowError) as error:
                raise ServerError(_port_error(name, port, host, error)) from None
            chosen[name] = listener.getsockname()[1]
    return address, chosen


def _port_error(name: str, port: int, host: str, error: OSError | OverflowError) -> str:
    where = f"port {port} ({PORT_NAMES[name]})"
    if isinstance(error, OverflowError):
        return f"{where}: expected 0 to 65535; choose another with --{name}-port"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: in use on {host}; stop what listens there or choose another with --{name}-port"
    return f"{where}: cannot listen on {host} ({error.strerror}); choose another --{name}-port or --host"


class Log(threading.Thread):
    """Reads the group's output to its end; keeps the last lines."""

    _ERROR = re.compile(r'(?:E\d{4} \S+ \d+ \S+\] "?|error: )(?P<text>.*?)"?$')
    _HARMLESS = ("CudaDriverHelper has not been initialized",)  # every machine without a GPU

    def __init__(self, stream: IO[bytes], echo: bool) -> None:
        super().__init__(name="triton-log", daemon=True)
        self.echo = echo
        self._stream = stream
        self._lines: collections.deque[str] = collections.deque(maxlen=2000)
        self.start()

    def run(self) -> None:
        for raw in self._stream:
            line = raw.decode(errors="replace")
            self._lines.append(line)
            if self.echo:
                with contextlib.suppress(OSError, ValueError):  # unread output would bring the group to a halt
                    sys.stderr.write(line)

    def text(self) -> str:
        return "".join(list(self._lines))

    def errors(self) -> str:
        """What Triton logged as errors; where it logged none, its complaint about its options or the last lines."""
        lines = list(self._lines)
        texts = [match["text"].replace("\\n", "\n").strip() for match in map(self._ERROR.match, lines) if match]
        texts = [text for text in texts if not text.startswith(self._HARMLESS)]
        usage = next((number for number, line in enumerate(lines) if line.startswith("Usage:")), 0)
        return "\n".join(texts) or "".join(lines[:usage] or lines[-20:]).rstrip() or "(it logged nothing)"


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
    ) -> None:
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
        self.log = Log(self.process.stdout, echo)

    def send_signal(self, number: signal.Signals) -> None:
        if self._guard is not None:  # else the number of the group may be another's by now
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)

    def close(self) -> None:
        """Kill what still runs and remove what is left; the log stays readable. May be called again."""
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.communicate(b"\n")
            self.process.wait()
            self.log.join(timeout=5)
