# SPDX-License-Identifier: Apache-2.0
"""Changes the LoRA adapters of a running server: `python -m longlive_client.cli.set_lora style.safetensors=0.8`.

New sessions use them; live sessions continue unchanged. The adapters replace those of the previous call; a call without
any removes them. The files are in the server's `adapters_dir`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence

from longlive_client.cli.health import send_command
from longlive_client.grpc_transport import DEFAULT_URL, Tls, add_access_arguments, get_tls
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.session_options import SET_LORA, Options

ADMIN_TOKEN_ENV = "LONGLIVE_ADMIN_TOKEN"


def set_adapters(
    url: str,
    adapters: Mapping[str, float],
    admin_token: str,
    timeout_s: float = 600.0,
    tls: Tls | None = None,
    access_token: str | None = None,
) -> str:
    """Set the adapters (file names, with scales) of new sessions. Returns the server's notice when they are in use.

    Raises RequestError if the server refuses, and ConnectionError without an answer within `timeout_s`.
    """
    options = Options(command=SET_LORA, adapters=dict(adapters), admin_token=admin_token)
    return send_command(url, options, timeout_s, tls, access_token)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_client.cli.set_lora", description=__doc__)
    text = "a file in the server's adapters_dir, with its scale (default: 1)"
    parser.add_argument("adapters", nargs="*", metavar="FILE[=SCALE]", help=text)
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's gRPC address (default: %(default)s)")
    text = f"the server's admin_token (default: ${ADMIN_TOKEN_ENV})"
    parser.add_argument("--admin-token", default=os.environ.get(ADMIN_TOKEN_ENV, ""), help=text)
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="default: %(default)g")
    add_access_arguments(parser)
    args = parser.parse_args(argv)
    try:
        adapters = dict(map(_adapter, args.adapters))
        tls = get_tls(parser, args)
        print(set_adapters(args.url, adapters, args.admin_token, args.timeout, tls, args.access_token))
    except (RequestError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


def _adapter(text: str) -> tuple[str, float]:
    name, equals, scale = text.partition("=")
    try:
        return name, float(scale) if equals else 1.0
    except ValueError:
        raise ValueError(f"{text}: got scale {scale!r}, expected a number") from None


if __name__ == "__main__":
    sys.exit(main())
