# SPDX-License-Identifier: Apache-2.0
"""`TritonServer` starts Triton with the model repository and stops it cleanly, for the command line, tests and demos.

It knows processes, ports and files, but nothing about videos: the model runs in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import NoReturn

from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.observability.metrics import sessions_at
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.protocol.messages import CLIENT_HEADER, MODEL_NAME
from longlive_serve.triton_server.addresses import Address, choose_ports, find_address
from longlive_serve.triton_server.arguments import DEFAULT_REPOSITORY, check_seconds
from longlive_serve.triton_server.find_triton import find_install
from longlive_serve.triton_server.process_group import ProcessGroup
from longlive_serve.triton_server.safe_paths import SafePaths, make_scratch
from longlive_serve.triton_server.tls_files import TlsFiles

RESTRICTED_APIS = "metadata,inference,shared-memory,model-config,model-repository,statistics,trace,logging"
POLL_S = 0.25
MAX_PORT_ATTEMPTS, PORT_IN_USE = 5, "already in use"  # in Triton's message
PROBE_EXIT, PROBE_TIMEOUT_S = "ended with exit status 1", 5.0
"""How Triton's probe ends (see `ProcessGroup.dead_child`), and how long Triton may take to wait for it."""
LAST_LINES_S = 0.5  # time for Triton to wait for a dead child and to log why it died
EXIT_SLACK_S = 3.0  # Triton checks once a second whether its models have ended


class TritonServer:
    """A Triton server as a context manager: ready on entry; on exit stopped, with its files and shared memory removed.

    `config` is the serve.toml that the model reads (default: the one in the repository). Port 0 is any free one. On
    exit, new sessions are refused and clients have `drain_timeout_s` to leave; then connections are closed. With
    `tls_cert` and `tls_key` (PEM files) gRPC accepts TLS only, with `tls_client_ca` only from clients with a
    certificate of this authority. Triton's HTTP has no TLS and then only answers health requests.
    Entering raises ServerStartError, or ValueError for a wrong serve.toml. The `*_url` are `host:port`.
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
        self._address: Address | None = None
        self._ports = {"grpc": grpc_port, "http": http_port, "metrics": metrics_port}
        self._ready_timeout_s = check_seconds("ready_timeout_s (--ready-timeout)", ready_timeout_s)
        self._drain_timeout_s = check_seconds("drain_timeout_s (--drain-timeout)", drain_timeout_s)
        self._tls = TlsFiles(cert=tls_cert, key=tls_key, client_ca=tls_client_ca)
        self._verbose = verbose
        self._group: ProcessGroup | None = None

    def __enter__(self) -> TritonServer:
        config = ServeConfig.from_toml(self.config)
        self._tls.check()
        if not (self._repository / MODEL_NAME / "config.pbtxt").is_file():
            raise ServerStartError(
                f"{self._repository}: got no {MODEL_NAME}/config.pbtxt in it, expected this project's model "
                "repository; name it with --model-repository"
            )
        self._address = find_address(self._host)
        requested = dict(self._ports)
        for num_left in reversed(range(MAX_PORT_ATTEMPTS)):
            self._ports = choose_ports(self._address, requested)
            self._group = self._start(config, self._address)
            try:
                self._wait_until_ready()
                break
            except BaseException as error:
                self._group.close()
                # Another program may have taken a port since it was chosen.
                if not (num_left and 0 in requested.values() and PORT_IN_USE in str(error)):
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
        """Triton's process, the leader of a process group that also has the model's process."""
        assert self._group is not None, "the server is not running"
        return self._group.process.pid

    @property
    def log_text(self) -> str:
        """The last lines that Triton and the model wrote."""
        return "" if self._group is None else self._group.log.text()

    @property
    def scope(self) -> str:
        """Which addresses it listens on, if more than those of the URLs; else empty."""
        return "" if self._address is None else self._address.scope

    def wait(self) -> NoReturn:
        """Block until Triton or the model's process ends by itself, which is an error. Prints their log."""
        assert self._group is not None, "the server is not running"
        self._group.log.verbose = True
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._group.process.wait(POLL_S)
            self._check_alive("by itself")

    def stop(self) -> None:
        """Stop Triton when its clients have left, or after `drain_timeout_s`; on an interrupt, kill it at once.

        SIGTERM goes to the model's process too: Triton does not notify the model while a client is connected.
        """
        if self._group is None:
            return
        self._group.log.verbose = self._verbose
        try:
            self._group.send_signal(signal.SIGTERM)
            self._wait_until_stopped()
        finally:
            self._group.close()

    def _wait_until_stopped(self) -> None:
        """Triton 2.51 does not exit before its timeout if a stream is open, or if it has refused one."""
        assert self._group is not None
        deadline = time.monotonic() + self._drain_timeout_s + EXIT_SLACK_S
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._group.process.wait(POLL_S)
                return
            if sessions_at(f"http://{self.metrics_url}/metrics") == 0:
                deadline = min(deadline, time.monotonic() + EXIT_SLACK_S)

    def kill(self) -> None:
        """Stop Triton at once."""
        if self._group is not None:
            self._group.close()

    def _url(self, name: str) -> str:
        assert self._address is not None, "the server has not been started"
        return self._address.url(self._ports[name])

    def _start(self, config: ServeConfig, address: Address) -> ProcessGroup:
        scratch = make_scratch()
        shm_prefix = f"longlive_{os.getpid()}_{secrets.token_hex(4)}_"
        try:
            paths = SafePaths(scratch)
            install = find_install(scratch)
            command = [str(install.binary), *self._options(paths.safe(self._repository), address, shm_prefix)]
            if install.backends is not None:
                command.append(f"--backend-directory={install.backends}")
            python, folder = paths.python()  # the embedded Python has this folder on sys.path
            variables = {"LONGLIVE_CONFIG": str(_write_config(config, paths, scratch))}
            return ProcessGroup(
                command,
                install.environment(paths, python) | variables,
                folder=folder,
                scratch=scratch,
                shm_prefix=Path("/dev/shm", shm_prefix),
                verbose=self._verbose,
                rename=paths.rename,
            )
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _options(self, repository: Path, address: Address, shm_prefix: str) -> list[str]:
        options = [
            f"--model-repository={repository}",
            "--model-control-mode=none",
            "--disable-auto-complete-config",  # it would start the model's process, and import torch, twice
            f"--exit-timeout-secs={round(self._drain_timeout_s)}",
            "--grpc-infer-response-compression-level=none",  # frames are large; clients can ask for encoded ones
            "--grpc-keepalive-time=10000",  # a client that hangs or lost its network counts as cancelled after 20 s;
            "--grpc-keepalive-timeout=10000",  # until then Triton keeps its unread frames in memory
            f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
            f"--grpc-header-forward-pattern={CLIENT_HEADER}",
        ]
        for name, port in self._ports.items():
            options += [address.option(name), f"--{name}-port={port}"]
        if self._tls.cert is not None:
            options += self._tls.options()
            # restricted to a random header
            options.append(f"--http-restricted-api={RESTRICTED_APIS}:{secrets.token_hex(16)}={secrets.token_hex(16)}")
        if not Path("/dev/nvidiactl").exists():
            options.append("--allow-gpu-metrics=false")
        return options

    def _wait_until_ready(self) -> None:
        """Wait for the model, which Triton's own readiness does not cover, and for the metrics."""
        assert self._group is not None
        urls = [f"http://{self.http_url}/v2/models/{MODEL_NAME}/ready", f"http://{self.metrics_url}/metrics"]
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + self._ready_timeout_s
        while time.monotonic() < deadline:
            self._check_alive("before the model was ready")
            with contextlib.suppress(OSError), opener.open(urls[0], timeout=1):
                del urls[0]
                if not urls:
                    return
            time.sleep(0.05)
        self._fail(f"the model was not ready after {self._ready_timeout_s:g} s (--ready-timeout)")

    def _check_alive(self, phase: str) -> None:
        """Raises ServerStartError with the last lines of the process that has ended."""
        assert self._group is not None
        group, log = self._group, self._group.log
        if group.dead_child():
            time.sleep(LAST_LINES_S)
        deadline = time.monotonic() + PROBE_TIMEOUT_S
        while (child := group.dead_child()) == PROBE_EXIT and not log.has_errors() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        if child and group.process.poll() is None:
            group.close()
            raise ServerStartError(f"the model's process {child} {phase}:\n{log.errors() or log.model_lines()}")
        if (status := group.process.poll()) is not None:
            self._fail(f"Triton ended with exit status {status} {phase}")

    def _fail(self, message: str) -> NoReturn:
        assert self._group is not None
        self._group.close()
        raise ServerStartError(f"{message}:\n{self._group.log.errors() or self._group.log.last_lines()}")


def _write_config(config: ServeConfig, paths: SafePaths, scratch: Path) -> Path:
    """The settings for the model's process, with paths that its Python can handle."""
    if config.trace_dir:  # before it is linked: mkdir fails at a dangling link
        Path(config.trace_dir).mkdir(parents=True, exist_ok=True)
    file = scratch / "serve.toml"
    file.write_text(config.with_paths(paths.safe).to_toml(), encoding="utf-8")
    return file
