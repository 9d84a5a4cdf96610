# SPDX-License-Identifier: Apache-2.0
"""Whether the server could listen: its address, its ports and who has them, the files of TLS."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.doctor.check_result import OK, PROBLEM, CheckResult, split
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.addresses import PORT_NAMES, Address, choose_ports, find_address
from longlive_serve.triton_server.tls_files import TlsFiles

PROC = Path("/proc")
LISTENING = "0A"  # in the tables of connections


def ports(host: str, wanted: Mapping[str, int]) -> list[CheckResult]:
    """`wanted`: by the names of `PORT_NAMES`; 0 is a free one."""
    try:
        address = find_address(host)
    except ServerStartError as error:
        return [CheckResult(PROBLEM, "host", str(error).removeprefix("host: "), "name another with --host")]
    try:
        choose_ports(address, wanted)
    except ServerStartError as error:
        taken = [(name, port, message) for name, port in wanted.items() if (message := _refusal(address, name, port))]
        if not taken:
            return [
                CheckResult(PROBLEM, "ports", str(error), "name others with --grpc-port, --http-port, --metrics-port")
            ]
        return [_taken(*one) for one in taken]
    free = ", ".join(f"{port or 'any'} ({PORT_NAMES[name]})" for name, port in wanted.items())
    return [CheckResult(OK, "ports", f"free on {address.ip}: {free}")]


def _refusal(address: Address, name: str, port: int) -> str:
    """Why the server could not listen there; empty: it could."""
    try:
        choose_ports(address, {name: port})
    except ServerStartError as error:
        return str(error)
    return ""


def _taken(name: str, port: int, message: str) -> CheckResult:
    found, action = split(message)
    found, who = found.removeprefix(f"port {port} ({PORT_NAMES[name]}): "), listener(port)
    return CheckResult(PROBLEM, f"port {port}", f"{PORT_NAMES[name]}: {found}{who and ' by '}{who}", action)


def tls(files: TlsFiles) -> list[CheckResult]:
    """Nothing without TLS."""
    if files.cert is None:
        return []
    try:
        files.check()
    except ValueError as error:
        return [CheckResult(PROBLEM, "TLS", *split(str(error)))]
    who = "clients that the authority has signed" if files.client_ca else "any client"
    return [CheckResult(OK, "TLS", f"{files.cert} and its key, for {who}")]


def listener(port: int) -> str:
    """The name and number of the process that listens on a port; empty where that cannot be seen."""
    sockets = {f"socket:[{inode}]" for inode in _listening(port)}
    for process in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text(encoding='utf-8').strip()} (process {process.name})"
    return ""


def _listening(port: int) -> Iterator[str]:
    """The inodes of the sockets that listen on a port."""
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (PROC / "net" / table).read_text(encoding="utf-8").splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    yield fields[9]
