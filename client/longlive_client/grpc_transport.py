# SPDX-License-Identifier: Apache-2.0
"""gRPC channels to a server, plain or with TLS, and access tokens. Used by the stream and by the commands."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from longlive_client.proxies import channel_options

DEFAULT_URL = "127.0.0.1:8001"
ACCESS_TOKEN_ENV = "LONGLIVE_ACCESS_TOKEN"
# Environment variables that hold the defaults of command-line options.
ENV_NAMES = {
    "tls-ca": "LONGLIVE_TLS_CA",
    "tls-cert": "LONGLIVE_CLIENT_CERT",
    "tls-key": "LONGLIVE_CLIENT_KEY",
    "access-token": ACCESS_TOKEN_ENV,
}
Options = Sequence[tuple[str, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """TLS to the server: PEM files. With `cert` and `key` the client authenticates itself (mutual TLS)."""

    ca: Path | str | None = None
    """Authorities that may sign the server's certificate; None: those of the system."""
    cert: Path | str | None = None
    key: Path | str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Raises OSError when a file cannot be read, ValueError when one of `cert` and `key` is missing."""
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: got one of cert and key, expected both or none")
        ca, key, cert = (None if file is None else Path(file).read_bytes() for file in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


def aio_channel(url: str, tls: Tls | None, options: Options) -> grpc.aio.Channel:
    options = [*options, *channel_options(url)]
    if tls is None:
        return grpc.aio.insecure_channel(url, options=options)
    return grpc.aio.secure_channel(url, tls.credentials(), options=options)


def channel(url: str, tls: Tls | None) -> Any:
    options = channel_options(url)
    if tls is None:
        return grpc.insecure_channel(url, options=options)
    return grpc.secure_channel(url, tls.credentials(), options=options)


def auth_metadata(access_token: str | None) -> tuple[tuple[str, str], ...]:
    """The call metadata with the access token for a proxy; empty without a token."""
    return () if access_token is None else (("authorization", f"Bearer {access_token}"),)


def access_error(url: str, code: grpc.StatusCode) -> str:
    """The error message if `code` means that a proxy rejected the call, else empty."""
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"{url}: got no valid access token, expected one (access_token, or ${ACCESS_TOKEN_ENV})"
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return f"{url}: the proxy does not permit this call"
    return ""


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in (
        ("tls-ca", "PEM", "use TLS; authority of the server's certificate, or 'system' for those of the system"),
        ("tls-cert", "PEM", "this client's own certificate (mutual TLS)"),
        ("tls-key", "PEM", "its private key"),
        ("access-token", "TOKEN", "access token for a proxy"),
    ):
        env_name = ENV_NAMES[name]
        default = os.environ.get(env_name)
        parser.add_argument(f"--{name}", metavar=kind, default=default, help=f"{text} (default: ${env_name})")


def get_tls(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Tls | None:
    """The TLS options of `add_access_arguments`; None: no TLS. Exits if they are inconsistent."""
    if args.tls_ca is None and (args.tls_cert or args.tls_key):
        parser.error("--tls-cert and --tls-key need --tls-ca")
    if args.tls_ca is None:
        return None
    return Tls(ca=None if args.tls_ca == "system" else args.tls_ca, cert=args.tls_cert, key=args.tls_key)
