# SPDX-License-Identifier: Apache-2.0
"""HTTP proxies from the environment: they are not used for local servers, and error messages name them.

Used for gRPC channels, and by the benchmark, which reads a server's metrics.
"""

from __future__ import annotations

import ipaddress
import os
import urllib.request
from typing import Any

# In gRPC's order; the first one that is set is used.
ENV_NAMES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy")


def host_of(url: str) -> str:
    """`host` of `host:port`, `[host]:port` and gRPC's longer forms, such as `dns:///host:port`."""
    text = url.rpartition("/")[2].removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    if text.startswith("["):
        return text[1:].partition("]")[0]
    host, colon, port = text.rpartition(":")
    return host if colon and port.isdecimal() and ":" not in host else text


def is_own(url: str) -> bool:
    """Whether the URL is an address of this machine."""
    host = host_of(url)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return url.startswith(("unix:", "unix-abstract:")) or host.lower().rstrip(".") == "localhost"
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or mapped.is_unspecified)


def channel_options(url: str) -> list[tuple[str, int]]:
    """gRPC's options for a channel to `url`."""
    return [("grpc.enable_http_proxy", 0)] if is_own(url) else []


def proxy_hint(url: str) -> str:
    """A suffix for the error of a connection that uses a proxy; empty: it uses none."""
    env_name = next((name for name in ENV_NAMES if os.environ.get(name)), None)
    if env_name is None or is_own(url):
        return ""
    exceptions = next(filter(None, map(os.environ.get, EXCEPTIONS)), "")
    if urllib.request.proxy_bypass_environment(host_of(url), {"no": exceptions}):  # type: ignore[attr-defined]
        return ""
    return f"; it uses the proxy in ${env_name}: unset that, or add {host_of(url)} to $no_proxy"


def open_http(url: str, timeout_s: float) -> Any:
    """The response to a GET. Raises OSError, which names the proxy if one is used."""
    own = is_own(url.partition("//")[2].partition("/")[0])
    handlers = [urllib.request.ProxyHandler({})] if own else []
    try:
        return urllib.request.build_opener(*handlers).open(url, timeout=timeout_s)
    except OSError as error:
        by = "" if own or not os.environ.get("http_proxy") else "; it uses the proxy in $http_proxy"
        raise OSError(f"{url}: {error}{by}") from None
