# SPDX-License-Identifier: Apache-2.0
"""The address on which the server listens, IPv4 or IPv6, and its three ports, in the syntax of Triton's options.

Called by `launcher.py` and by the doctor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import socket
from collections.abc import Mapping

from longlive_serve.protocol.errors import ServerStartError

PORT_NAMES = {"grpc": "gRPC", "http": "HTTP", "metrics": "metrics"}
EXPECTED = "expected an address of this machine: 127.0.0.1 or ::1 for local clients only, 0.0.0.0 or :: for all"


@dataclasses.dataclass(frozen=True)
class Address:
    """An IP address to listen on."""

    ip: ipaddress.IPv4Address | ipaddress.IPv6Address

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET if self.ip.version == 4 else socket.AF_INET6

    def option(self, name: str) -> str:
        """Triton's option for one of `PORT_NAMES`; gRPC and HTTP take IPv6 addresses in different syntax."""
        text = str(self.ip)
        if self.ip.version == 6:
            text = f"[{text}]" if name == "grpc" else f"ipv6:{text}"
        return f"--{name}-address={text}"

    def url(self, port: int) -> str:
        """`host:port` for clients on this machine."""
        if self.ip.is_unspecified:
            return f"127.0.0.1:{port}" if self.ip.version == 4 else f"[::1]:{port}"
        return f"{self.ip}:{port}" if self.ip.version == 4 else f"[{self.ip}]:{port}"

    @property
    def scope(self) -> str:
        """Which addresses it listens on, if more than the one of the URL; else empty."""
        if not self.ip.is_unspecified:
            return ""
        return "all IPv4 addresses" if self.ip.version == 4 else "all addresses (HTTP and metrics: IPv6 alone)"


def find_address(host: str) -> Address:
    """The address that `host` names; IPv4 where it has both. Raises ServerStartError."""
    name = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not name.strip():
        raise ServerStartError(f"host: got {host!r}, {EXPECTED}")
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServerStartError(f"host: got {host!r}, {EXPECTED} ({error})") from None
    found = [one for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)]
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    if not found:
        raise ServerStartError(f"host: got {host!r}, {EXPECTED}")
    text = str(found[0][4][0]).partition("%")[0]
    if "%" in name:
        raise ServerStartError(f"host: got {host!r}, expected an address without a zone, which Triton does not take")
    ip = ipaddress.ip_address(text)
    if ip.is_unspecified and name not in ("0.0.0.0", "::"):
        raise ServerStartError(
            f"host: got {host!r}, which is every address of this machine; say 0.0.0.0 or :: to mean it"
        )
    return Address(ip)


def choose_ports(address: Address, ports: Mapping[str, int]) -> dict[str, int]:
    """`ports` with each 0 replaced by a free port. Raises ServerStartError."""
    requested = [port for port in ports.values() if port]
    if len(set(requested)) < len(requested):
        raise ServerStartError(f"ports: got {dict(ports)}, expected three different ones")
    chosen = {}
    with contextlib.ExitStack() as stack:  # all stay bound until the last one is chosen, so that they differ
        for name, port in ports.items():
            sock = stack.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind((str(address.ip), port))
                sock.listen()  # with SO_REUSEADDR, only listen() fails on a port in use
            except (OSError, OverflowError) as error:
                raise ServerStartError(_port_error(name, port, address, error)) from None
            chosen[name] = sock.getsockname()[1]
    return chosen


def _port_error(name: str, port: int, address: Address, error: OSError | OverflowError) -> str:
    prefix, host = f"port {port} ({PORT_NAMES[name]})", address.ip
    if isinstance(error, OverflowError):
        return f"{prefix}: expected 0 to 65535; choose another with --{name}-port"
    if error.errno == errno.EADDRINUSE:
        return f"{prefix}: in use on {host}; stop what listens there or choose another with --{name}-port"
    return f"{prefix}: cannot listen on {host} ({error.strerror}); choose another --{name}-port or --host"
