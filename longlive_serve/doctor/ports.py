# SPDX-License-Identifier: Apache-2.0
"""Whether the server's ports are free, and if not, who listens there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.doctor.finding import OK, PROBLEM, Finding, split
from longlive_serve.triton_install import ServerError
from longlive_serve.triton_process import PORT_NAMES, choose_ports

PROC = Path("/proc")
LISTENING = "0A"  # in the tables of connections


def ports(host: str, wanted: Mapping[str, int]) -> list[Finding]:
    """`wanted`: by the names of `PORT_NAMES`; 0 is a free one."""
    try:
        choose_ports(host, wanted)
    except ServerError as error:
        taken = [(name, port, message) for name, port in wanted.items() if (message := _refusal(host, name, port))]
        if not taken or str(error).startswith("host"):
            return [Finding(PROBLEM, "ports", str(error), "name others with --host and --ports")]
        return [_taken(*one) for one in taken]
    free = ", ".join(f"{port or 'any'} ({PORT_NAMES[name]})" for name, port in wanted.items())
    return [Finding(OK, "ports", f"free on {host}: {free}")]


def _refusal(host: str, name: str, port: int) -> str:
    """Why the server could not listen there; empty: it could."""
    try:
        choose_ports(host, {name: port})
    except ServerError as error:
        return str(error)
    return ""


def _taken(name: str, port: int, message: str) -> Finding:
    found, action = split(message)
    found, who = found.removeprefix(f"port {port} ({PORT_NAMES[name]}): "), listener(port)
    return Finding(PROBLEM, f"port {port}", f"{PORT_NAMES[name]}: {found}{who and ' by '}{who}", action)


def listener(port: int) -> str:
    """The name and number of the process that listens on a port; empty where that cannot be seen."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
    return ""


def _listening(port: int) -> Iterator[str]:
    """The inodes of the sockets that listen on a port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
