# SPDX-License-Identifier: Apache-2.0
"""Whether the server could listen: its address, its ports and the TLS files."""

from __future__ import annotations

from collections.abc import Mapping

from longlive_serve.doctor.check_result import ERROR, OK, CheckResult, split_error
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.addresses import PORT_NAMES, choose_ports, find_address
from longlive_serve.triton_server.tls_files import TlsFiles


def check_ports(host: str, ports: Mapping[str, int]) -> list[CheckResult]:
    """`ports`: by the names of `PORT_NAMES`; 0 is any free one."""
    try:
        address = find_address(host)
    except ServerStartError as error:
        return [CheckResult(ERROR, "host", str(error).removeprefix("host: "), "set another with --host")]
    results: list[CheckResult] = []
    for candidates in ({name: port} for name, port in ports.items()):  # one by one, to report each that is in use
        try:
            choose_ports(address, candidates)
        except ServerStartError as error:
            results.append(CheckResult(ERROR, "ports", *split_error(str(error))))
    try:
        choose_ports(address, ports)
    except ServerStartError as error:
        return results or [CheckResult(ERROR, "ports", str(error), "set them with --grpc-port, --http-port, ...")]
    free = ", ".join(f"{port or 'any'} ({PORT_NAMES[name]})" for name, port in ports.items())
    return [CheckResult(OK, "ports", f"free on {address.ip}: {free}")]


def check_tls(files: TlsFiles) -> list[CheckResult]:
    """Empty without TLS."""
    if files.cert is None:
        return []
    try:
        files.check()
    except ValueError as error:
        return [CheckResult(ERROR, "TLS", *split_error(str(error)))]
    clients = f"clients with a certificate of {files.client_ca}" if files.client_ca else "any client"
    return [CheckResult(OK, "TLS", f"{files.cert} and its key, for {clients}")]
