# SPDX-License-Identifier: Apache-2.0
"""The options of the server's command line, which the doctor takes as well."""

from __future__ import annotations

import argparse
from pathlib import Path

from longlive_serve.protocol.messages import MODEL_NAME
from longlive_serve.triton_server.addresses import PORT_NAMES
from longlive_serve.triton_server.find_triton import PACKAGE_PARENT

DEFAULT_REPOSITORY = PACKAGE_PARENT / "model_repository"
DEFAULT_CONFIG = DEFAULT_REPOSITORY / MODEL_NAME / "1" / "serve.toml"
DEFAULT_PORTS = {"grpc": 8001, "http": 8000, "metrics": 8002}
MAX_SECONDS = 86_400.0


def check_seconds(name: str, seconds: float) -> float:
    """Returns `seconds`. Raises ValueError for NaN and for values out of range."""
    if not 0 <= seconds <= MAX_SECONDS:
        raise ValueError(f"{name}: got {seconds:g}, expected 0 to {MAX_SECONDS:g} seconds")
    return seconds


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that the server and the doctor share."""
    text = "serve.toml (default: the shipped one, the demo model)"
    parser.add_argument("--config", type=Path, metavar="TOML", help=text)
    text = (
        "an address of this machine, IPv4 or IPv6; 0.0.0.0 for all IPv4 addresses, :: for IPv6 too "
        "(default: %(default)s)"
    )
    parser.add_argument("--host", default="127.0.0.1", help=text)
    for name, port in DEFAULT_PORTS.items():
        text = f"port of {PORT_NAMES[name]}; 0: a free one (default: {port})"
        parser.add_argument(f"--{name}-port", type=int, default=port, metavar="PORT", help=text)
    for name, text in (
        ("cert", "certificate chain of the server: gRPC then accepts TLS only"),
        ("key", "its private key, without a password"),
        ("client-ca", "accept only clients with a certificate of this authority (mutual TLS)"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="PEM", help=text)


def server_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longlive_serve.triton_server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve LongLive with Triton in the foreground, until Ctrl-C or SIGTERM. Clients then have\n"
        "--drain-timeout seconds to leave; a second Ctrl-C stops it at once. The server is tritonserver on PATH or in\n"
        "/opt/tritonserver/bin, else the one that pip install 'longlive-serve[triton]' installs.",
        epilog="serve.toml has the settings: preset, weights, device, slots (docs/settings.md). To use another:\n"
        "  python -m longlive_serve.triton_server --config my-serve.toml\n"
        "Readiness for load balancers: GET http://HOST:HTTP_PORT/v2/models/longlive/ready\n"
        "To check the machine first: python -m longlive_serve.doctor, with the same options",
    )
    add_server_arguments(parser)
    text = "default: %(default)s"
    parser.add_argument("--model-repository", type=Path, default=DEFAULT_REPOSITORY, metavar="DIR", help=text)
    for name, seconds, event in (("ready", 600.0, "the model to load"), ("drain", 10.0, "clients to leave")):
        text = f"seconds for {event} (default: {seconds:g})"
        dest = f"{name}_timeout_s"
        parser.add_argument(f"--{name}-timeout", type=float, default=seconds, dest=dest, metavar="S", help=text)
    parser.add_argument("--verbose", action="store_true", help="print all log lines of Triton, also before it is ready")
    return parser
