# SPDX-License-Identifier: Apache-2.0
"""Starts Triton with the model repository and ends it cleanly: a command line, and `TritonServer` for tests and demos.

It knows processes, ports and files; it knows nothing of videos, and Triton's models run in processes of their own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

from longlive_serve.config import ServeConfig
from longlive_serve.protocol import CLIENT_HEADER, MODEL_NAME
from longlive_serve.statistics import sessions_at
from longlive_serve.triton_install import PACKAGE_PARENT, ServerError, find_install
from longlive_serve.triton_process import PORT_NAMES, ProcessGroup, choose_ports

__all__ = ["ServerError", "TritonServer", "main"]

DEFAULT_REPOSITORY = PACKAGE_PARENT / "model_repository"
DEFAULT_CONFIG = DEFAULT_REPOSITORY / MODEL_NAME / "1" / "serve.toml"
DEFAULT_PORTS = {"grpc": 8001, "http": 8000, "metrics": 8002}
ALL_BUT_HEALTH = "metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"
POLL_S = 0.25
EXIT_SLACK_S = 3.0  # Triton looks once a second whether its models have ended


class TritonServer:
    """A Triton server for `with`: ready on entry, gone on exit with all that it left on disk and in shared memory.

    `config` is the serve.toml that the model reads (default: the one in the repository). A port of 0 is chosen
    freely. On exit, clients have `drain_timeout_s` to leave, and new sessions are refused; then connections break.
    With `tls_cert` and `tls_key` (PEM files) gRPC speaks TLS alone, with `tls_client_ca` only to clients that this
    authority has signed; Triton's HTTP knows no TLS and then answers for health alone.
    Entering raises ServerError, or ValueError for a wrong serve.toml. The `*_url` are `host:port`.
    """

    def __init__(
        self,
        *,
        config: Path | None = None,
        model_repository: Path = DEFAULT_REPOSITORY,
        host: str = "127.0.0.1",
        grpc_port: int = 0,
        http_port: int = 0,
        metrics_port: int = 0,
        ready_timeout_s: float = 600.0,
        drain_timeout_s: float = 10.0,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        tls_client_ca: Path | None = None,
        verbose: bool = False,
    ) -> None:
        self._repository = Path(model_repository).absolute()
        default_config = self._repository / MODEL_NAME / "1" / "serve.toml"
        self.config = default_config if config is None else Path(config).absolute()
        self._host = host
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._ready_timeout_s = ready_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._tls = _tls_options(tls_cert, tls_key, tls_client_ca)
        self._verbose = verbose
        self._group: ProcessGroup | None = None

    def __enter__(self) -> TritonServer:
        ServeConfig.from_toml(self.config)
        if not (self._repository / MODEL_NAME / "config.pbtxt").is_file():
            raise ServerError(
                f"{self._repository}: got no {MODEL_NAME}/config.pbtxt in it, expected this project's model "
                "repository; name it with --model-repository"
            )
        self._host, self._ports = choose_ports(self._host, self._ports)
        self._group = self._start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._group.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def grpc_url(self) -> str:
        return self._url("grpc")

    @property
    def http_url(self) -> str:
        return self._url("http")

    @property
    def metrics_url(self) -> str:
        return self._url("metrics")

    @property
    def pid(self) -> int:
        """Triton's process. It leads a process group of its own, in which the model's process is too."""
        assert self._group is not None, "the server is not running"
        return self._group.process.pid

    @property
    def log_text(self) -> str:
        """The last lines that Triton and the model wrote."""
        return "" if self._group is None else self._group.log.text()

    def wait(self) -> NoReturn:
        """Stay until Triton ends by itself, which is an error, and meanwhile show its log."""
        assert self._group is not None, "the server is not running"
        self._group.log.echo = True
        self._fail(f"Triton ended by itself with exit status {self._group.process.wait()}")

    def stop(self) -> None:
        """End Triton when its clients have left, or after `drain_timeout_s`; interrupted, it kills Triton at once.

        SIGTERM goes to the model's process too: Triton tells the model nothing while a client is connected.
        """
        if self._group is None:
            return
        self._group.log.echo = self._verbose
        try:
            self._group.send_signal(signal.SIGTERM)
            self._wait_until_gone()
        finally:
            self._group.close()

    def _wait_until_gone(self) -> None:
        """Triton 2.51 stays while a client's stream is open, or after it has refused one: for as long as it may."""
        assert self._group is not None
        deadline = time.monotonic() + self._drain_timeout_s + EXIT_SLACK_S
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._group.process.wait(POLL_S)
                return
            if sessions_at(f"http://{self.metrics_url}/metrics") == 0:
                deadline = min(deadline, time.monotonic() + EXIT_SLACK_S)

    def kill(self) -> None:
        """End Triton at once, clients or not."""
        if self._group is not None:
            self._group.close()

    def _url(self, name: str) -> str:
        return f"{'127.0.0.1' if self._host == '0.0.0.0' else self._host}:{self._ports[name]}"

    def _start(self) -> ProcessGroup:
        scratch = Path(tempfile.mkdtemp(prefix="longlive-serve-"))
        shm_prefix = f"longlive_{os.getpid()}_{secrets.token_hex(4)}_"
        try:
            install = find_install(scratch)
            command = [str(install.binary), *self._options(shm_prefix)]
            if install.backends is not None:
                command.append(f"--backend-directory={install.backends}")
            return ProcessGroup(
                command,
                install.environment() | {"LONGLIVE_CONFIG": str(self.config)},
                working_directory=PACKAGE_PARENT,  # the embedded Python has it on sys.path
                scratch=scratch,
                shm_prefix=Path("/dev/shm", shm_prefix),
                echo=self._verbose,
            )
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _options(self, shm_prefix: str) -> list[str]:
        options = [
            f"--model-repository={self._repository}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",  # it would start the model's process, and import torch, twice
            f"--exit-timeout-secs={round(self._drain_timeout_s)}",
            "--grpc-infer-response-compression-level=none",  # frames are big, and clients are near or encode them
            "--grpc-keepalive-time=10000",  # a client that froze or lost its network counts as cancelled after 20 s;
            "--grpc-keepalive-timeout=10000",  # until then its unread frames pile up in Triton's memory
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--grpc-header-forward-pattern={CLIENT_HEADER}",
        ]
        for name, port in self._ports.items():
            options += [f"--{name}-address={self._host}", f"--{name}-port={port}"]
        options += self._tls
        if self._tls:  # by a header that nobody knows
            options.append(f"--http-restricted-api={ALL_BUT_HEALTH}:{secrets.token_hex(16)}={secrets.token_hex(16)}")
        if not Path("/dev/nvidiactl").exists():
            options.append("--allow-gpu-metrics=false")
        return options

    def _wait_until_ready(self) -> None:
        """Wait for the model, as Triton's own readiness does not say that one answers, and for the metrics."""
        assert self._group is not None
        waited_for = [f"http://{self.http_url}/v2/models/{MODEL_NAME}/ready", f"http://{self.metrics_url}/metrics"]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            status = self._group.process.poll()
            if status is not None:
                self._fail(f"Triton ended with exit status {status} before the model was ready")
            with contextlib.suppress(OSError), opener.open(waited_for[0], timeout=1):
                del waited_for[0]
                if not waited_for:
                    return
            time.sleep(0.05)
        self._fail(f"the model was not ready after {self._ready_timeout_s:g} s (--ready-timeout)")

    def _fail(self, what: str) -> NoReturn:
        assert self._group is not None
        self._group.close()
        raise ServerError(f"{what}:\n{self._group.log.errors()}")


def _tls_options(cert: Path | None, key: Path | None, client_ca: Path | None) -> list[str]:
    if (cert is None) != (key is None) or (client_ca is not None and cert is None):
        raise ValueError("tls: got some of cert, key and client_ca, expected cert and key, or all three, or none")
    files = {"server-cert": cert, "server-key": key, "root-cert": client_ca}
    for name, file in files.items():
        if file is not None and not Path(file).is_file():
            raise ValueError(f"tls: {file}: no such file (expected a PEM file: {name})")
    options = [f"--grpc-{name}={Path(file).absolute()}" for name, file in files.items() if file is not None]
    if cert is not None:
        options.append("--grpc-use-ssl=true" if client_ca is None else "--grpc-use-ssl-mutual=true")
    return options


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longlive_serve.server",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Serve LongLive with Triton in the foreground, until Ctrl-C or SIGTERM. Clients then have\n"
        "--drain-timeout seconds to leave; a second Ctrl-C ends it at once. The server is tritonserver on PATH or in\n"
        "/opt/tritonserver/bin, else the one that pip install 'longlive-serve[triton]' brings.",
        epilog="What is served stands in serve.toml: sizes, weights, device, slots. To serve another:\n"
        "  python -m longlive_serve.server --config my-serve.toml\n"
        "Ready for load balancers: GET http://HOST:HTTP_PORT/v2/models/longlive/ready",
    )
    text = "serve.toml (default: longlive/1/serve.toml in the repository)"
    parser.add_argument("--config", type=Path, metavar="TOML", help=text)
    text = "default: %(default)s"
    parser.add_argument("--model-repository", type=Path, default=DEFAULT_REPOSITORY, metavar="DIR", help=text)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in (default: %(default)s)")
    for name, port in DEFAULT_PORTS.items():
        text = f"port of {PORT_NAMES[name]}; 0: a free one (default: {port})"
        parser.add_argument(f"--{name}-port", type=int, default=port, metavar="PORT", help=text)
    for name, seconds, what in (("ready", 600.0, "the model to load"), ("drain", 10.0, "clients to leave")):
        text = f"seconds for {what} (default: {seconds:g})"
        dest = f"{name}_timeout_s"
        parser.add_argument(f"--{name}-timeout", type=float, default=seconds, dest=dest, metavar="S", help=text)
    for name, text in (
        ("cert", "certificate chain of the server: gRPC then speaks TLS alone"),
        ("key", "its private key"),
        ("client-ca", "only clients that this authority has signed get in (mutual TLS)"),
    ):
        parser.add_argument(f"--tls-{name}", type=Path, metavar="PEM", help=text)
    parser.add_argument("--verbose", action="store_true", help="show all that Triton logs, from the start")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    try:
        server = TritonServer(**vars(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)  # a shell that starts it in the background has it ignored
    print(f"starting Triton with {server.config} ...", file=sys.stderr, flush=True)
    try:
        with server:
            print(
                f"ready: gRPC {server.grpc_url}, HTTP {server.http_url}, metrics {server.metrics_url}/metrics "
                "(Ctrl-C ends it)",
                flush=True,
            )
            try:
                server.wait()
            except KeyboardInterrupt:
                text = f"stopping: clients have {args.drain_timeout_s:g} s to leave; Ctrl-C again ends it at once"
                print(text, file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        pass
    except (ServerError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
