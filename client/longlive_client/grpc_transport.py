# SPDX-License-Identifier: Apache-2.0
"""gRPC channels to a server, plain or with TLS, and what lets a client in. Used by the stream and by the probe."""

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
# Where an option of a command is not given, the environment may have it.
ENV_NAMES = {
    "tls-ca": "LONGLIVE_TLS_CA",
    "tls-cert": "LONGLIVE_CLIENT_CERT",
    "tls-key": "LONGLIVE_CLIENT_KEY",
    "access-token": ACCESS_TOKEN_ENV,
}
Options = Sequence[tuple[str, int]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tls:
    """TLS to the server: PEM files. With `cert` and `key` the client shows who it is (mutual TLS)."""

    ca: Path | str | None = None
    """Certificates that the server's must be signed by; None: those of the system."""
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
    """The header of a call by which a proxy lets the client in; none without a token."""
    return () if access_token is None else (("authorization", f"Bearer {access_token}"),)


def access_error(url: str, code: grpc.StatusCode) -> str:
    """What to say when a proxy has not let a call through; empty: that is not what has happened."""
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return f"{url}: got no access token that is known there, expected one (access_token, or ${ACCESS_TOKEN_ENV})"
    if code == grpc.StatusCode.PERMISSION_DENIED:
        return f"{url}: this call is not let through there"
    return ""


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    for name, kind, text in (
        ("tls-ca", "PEM", "speak TLS; this authority, or 'system': one of the system's, must have signed the server's"),
        ("tls-cert", "PEM", "this client's own certificate (mutual TLS)"),
        ("tls-key", "PEM", "its private key"),
        ("access-token", "TOKEN", "what a proxy lets this client in by"),
    ):
        env_name = ENV_NAMES[name]
        default = os.environ.get(env_name)
        parser.add_argument(f"--{name}", metavar=kind, default=default, help=f"{text} (default: ${env_name})")


def get_tls(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Tls | None:
    """What `add_access_arguments` took in of it; ends the program when it does not fit together."""
    if args.tls_ca is None and (args.tls_cert or args.tls_key):
        parser.error("--tls-cert and --tls-key go with --tls-ca")
    if args.tls_ca is None:
        return None
    return Tls(ca=None if args.tls_ca == "system" else args.tls_ca, cert=args.tls_cert, key=args.tls_key)
