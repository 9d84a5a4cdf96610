# SPDX-License-Identifier: Apache-2.0
"""Health check of a server's model: `python -m longlive_client.cli.health --url 127.0.0.1:8001`.

Triton's own health endpoints still report ready when the model's process is dead or hangs; this asks the worker that
generates the frames. Exit code 0: it answered in time; 1: it did not, or with `--ready` a new session would be refused
or have to wait.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from tritonclient.grpc import service_pb2_grpc

from longlive_client import wire
from longlive_client.grpc_transport import (
    DEFAULT_URL,
    Tls,
    access_error,
    add_access_arguments,
    auth_metadata,
    channel,
    get_tls,
)
from longlive_client.proxies import proxy_hint
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import READY, Request
from longlive_serve.protocol.session_options import HEALTH, Options


def probe(url: str, timeout_s: float, tls: Tls | None = None, access_token: str | None = None) -> str:
    """The model's answer: `ready`, or why a new session would have to wait. Raises like `send_command`."""
    return send_command(url, Options(command=HEALTH), timeout_s, tls, access_token)


def send_command(
    url: str, options: Options, timeout_s: float, tls: Tls | None = None, access_token: str | None = None
) -> str:
    """Send the command in `options`, and return the NOTICE that answers it.

    Raises ConnectionError when no answer comes within `timeout_s`, and RequestError when the model refuses.
    """
    request = Request(session_id=wire.new_session_id(), start=True, end=True, options=options)
    message = wire.infer_request(request.session_id, "command", request.to_tensors(), start=True, end=True)
    with channel(url, tls) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        try:
            for response in stub.ModelStreamInfer(
                iter([message]), timeout=timeout_s, metadata=auth_metadata(access_token)
            ):
                if response.error_message:
                    raise _parse_error(response.error_message)
                chunk = wire.read_chunk(response)
                if chunk is not None:
                    return chunk.notice
        except grpc.RpcError as error:
            message = f"{url}: the model gave no answer in {timeout_s:g} s ({error.code().name}){proxy_hint(url)}"
            raise ConnectionError(access_error(url, error.code()) or message) from None
    raise ConnectionError(f"{url}: the stream ended without an answer")


def _parse_error(text: str) -> Exception:
    """A RequestError if the model refused, or a ConnectionError if Triton has no model."""
    error = RequestError.parse(text)
    return ConnectionError(text) if error.kind == RequestError.INTERNAL else error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_client.cli.health", description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's gRPC address (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=5.0, metavar="S", help="default: %(default)g")
    parser.add_argument("--ready", action="store_true", help="also check whether a new session would start at once")
    add_access_arguments(parser)
    args = parser.parse_args(argv)
    try:
        answer = probe(args.url, args.timeout, get_tls(parser, args), args.access_token)
    except (OSError, ValueError) as error:
        if not isinstance(error, ConnectionError):
            parser.error(str(error))
        print(f"dead: {error}", file=sys.stderr)
        return 1
    except RequestError as error:
        print(error, file=sys.stderr)
        return 1 if args.ready else 0
    print(answer)
    return 1 if args.ready and answer != READY else 0


if __name__ == "__main__":
    sys.exit(main())
