# SPDX-License-Identifier: Apache-2.0
"""The server's command line: `python -m longlive_serve.triton_server` serves until Ctrl-C or SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType

from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.arguments import server_parser
from longlive_serve.triton_server.launcher import TritonServer
from longlive_serve.triton_server.standard_outputs import Console, reserve_standard_descriptors


def _interrupt(sig: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    reserve_standard_descriptors()
    parser = server_parser()
    args = parser.parse_args(argv)
    try:
        server = TritonServer(**vars(args))
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # a shell ignores it in background processes
    console = Console()
    console.info(f"starting Triton with {server.config} ...")
    try:
        return _serve(server, args.drain_timeout_s, console)
    except KeyboardInterrupt:
        return 0
    except (ServerStartError, ValueError, OSError) as error:  # a full disk, a trace_dir that cannot be made
        console.info(f"error: {error}")
        return 1
    finally:
        console.close()


def _serve(server: TritonServer, drain_timeout_s: float, console: Console) -> int:
    with server:
        urls = f"gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}/metrics"
        console.print(f"ready: {urls}{server.scope and f', on {server.scope} of this machine'} (Ctrl-C stops it)")
        try:
            server.wait()
        except KeyboardInterrupt:
            console.info(f"stopping: clients have {drain_timeout_s:g} s to leave; Ctrl-C again stops it at once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
