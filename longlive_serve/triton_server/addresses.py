# SPDX-License-Identifier: Apache-2.0
"""Where the server listens: an address of this machine, IPv4 or IPv6, and its three ports.

Called by `launcher.py` and by the doctor. It knows how Triton wants addresses written.
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
EXPECTED = "expected an address of this machine: 127.0.0.1 or ::1 for itself alone, 0.0.0.0 or :: for all that reach it"


@dataclasses.dataclass(frozen=True)
class Address:
    """An IP address to listen on."""

    ip: ipaddress.IPv4Address | ipaddress.IPv6Address

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET if self.ip.version == 4 else socket.AF_INET6

    def option(self, name: str) -> str:
        """Triton's option for one of `PORT_NAMES`: its gRPC and its HTTP want IPv6 written differently."""
        text = str(self.ip)
        if self.ip.version == 6:
            text = f"[{text}]" if name == "grpc" else f"ipv6:{text}"
        return f"--{name}-address={text}"

    def url(self, port: int) -> str:
        """`host:port` by which this machine reaches it."""
        if self.ip.is_unspecified:
            return f"127.0.0.1:{port}" if self.ip.version == 4 else f"[::1]:{port}"
        return f"{self.ip}:{port}" if self.ip.version == 4 else f"[{self.ip}]:{port}"

    @property
    def reach(self) -> str:
        """Who gets there, where that is more than the url says; else nothing."""
        if not self.ip.is_unspecified:
            return ""
        return "all IPv4 addresses" if self.ip.version == 4 else "all addresses (HTTP and metrics: IPv6 alone)"


def find_address(host: str) -> Address:
    """The address that `host` names; IPv4 where it has both. Raises ServerStartError."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare.strip():
        raise ServerStartError(f"host: got {host!r}, {EXPECTED}")
    try:
        found = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServerStartError(f"host: got {host!r}, {EXPECTED} ({error})") from None
    found = [one for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)]
    found.sort(key=lambda one: one[0] != socket.AF_INET)
    if not found:
        raise ServerStartError(f"host: got {host!r}, {EXPECTED}")
    text = str(found[0][4][0]).partition("%")[0]
    if "%" in bare:
        raise ServerStartError(f"host: got {host!r}, expected an address without a zone, which Triton does not take")
    ip = ipaddress.ip_address(text)
    if ip.is_unspecified and bare not in ("0.0.0.0", "::"):
        raise ServerStartError(
            f"host: got {host!r}, which is every address of this machine; say 0.0.0.0 or :: to mean it"
        )
    return Address(ip)


def choose_ports(address: Address, ports: Mapping[str, int]) -> dict[str, int]:
    """The ports with each 0 replaced by a free one. Raises ServerStartError."""
    given = [port for port in ports.values() if port]
    if len(set(given)) < len(given):
        raise ServerStartError(f"ports: got {dict(ports)}, expected three different ones")
    chosen = {}
    with contextlib.ExitStack() as stack:  # all stay bound until the last is chosen, so that they differ
        for name, port in ports.items():
            listener = stack.enter_context(socket.socket(address.family, socket.SOCK_STREAM))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((str(address.ip), port))
                listener.listen()  # with SO_REUSEADDR, only listening tells a free port from one in use
            except (OSError, OverflowError) as error:
                raise ServerStartError(_port_error(name, port, address, error)) from None
            chosen[name] = listener.getsockname()[1]
    return chosen


def _port_error(name: str, port: int, address: Address, error: OSError | OverflowError) -> str:
    where, host = f"port {port} ({PORT_NAMES[name]})", address.ip
    if isinstance(error, OverflowError):
        return f"{where}: expected 0 to 65535; choose another with --{name}-port"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: in use on {host}; stop what listens there or choose another with --{name}-port"
    return f"{where}: cannot listen on {host} ({error.strerror}); choose another --{name}-port or --host"
