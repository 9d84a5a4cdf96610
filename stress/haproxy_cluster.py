# SPDX-License-Identifier: Apache-2.0
"""Servers behind HAProxy, with a supervisor that restarts dead processes like an orchestrator.

Used by the stress tests. HAProxy's settings are those of deploy/; with `Keys`, all connections use mutual TLS.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

from longlive_client.cli.health import probe
from longlive_serve.protocol.errors import RequestError
from longlive_serve.triton_server.launcher import TritonServer
from stress.test_pki import Keys

PROBE_S = 5.0  # a model that does not respond within this time is dead
POLL_S = 0.5

PROXY = Path(__file__).parents[1] / "deploy/proxy/haproxy.cfg"  # a second file lists the servers
STICKY = "  stick on hdr(x-session-id) table sticky"


class Cluster:
    """A context manager: ready on entry, stopped on exit. Clients connect to `url`."""

    def __init__(self, servers: int, config: Path, keys: Keys | None = None) -> None:
        haproxy = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
        if haproxy is None:
            raise RuntimeError("haproxy: not found; install it (Debian, Ubuntu: apt-get install haproxy)")
        self._haproxy = haproxy
        self._config = config
        self._stack = contextlib.ExitStack()
        clear, proxy, status, *ports = _free_ports(3 + 2 * servers)
        self._ports = list(zip(ports[::2], ports[1::2], strict=True))  # gRPC and HTTP of every server
        self.url = f"127.0.0.1:{proxy}"
        self._addresses = {"LONGLIVE_PROXY": self.url, "LONGLIVE_PROXY_STATUS": f"127.0.0.1:{status}"}
        self._keys = keys
        if keys is not None:
            keys.make()
            self._addresses |= keys.of_proxy(self.url) | {"LONGLIVE_PROXY": f"127.0.0.1:{clear}"}
        self.servers: list[TritonServer] = []
        self.restarts = 0
        self._going: set[int] = set()  # servers that are shutting down
        self._proxy: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._supervisors: list[threading.Thread] = []

    def __enter__(self) -> Self:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="longlive-cluster-")))
        lines = [f"  server s{n} 127.0.0.1:{grpc} check port {http}" for n, (grpc, http) in enumerate(self._ports)]
        self._list = folder / "servers.cfg"
        self._list.write_text("\n".join(["backend servers", STICKY, *lines, ""]))
        try:
            for number in range(len(self._ports)):
                self.servers.append(self._start_server(number))
            self._start_proxy()
            self.wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        watches = [self._watch_proxy, *(lambda n=n: self._watch_server(n) for n in range(len(self._ports)))]
        self._supervisors = [threading.Thread(target=watch, daemon=True) for watch in watches]
        for thread in self._supervisors:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def kill_server(self, number: int) -> None:
        """Kill Triton's process; its stub and shared memory remain for the clean-up code."""
        _kill(self.servers[number].pid)

    def kill_model(self, number: int) -> None:
        """Kill the model's process, which Triton does not notice."""
        pid = self.servers[number].pid
        for stub in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split():
            _kill(int(stub))

    def kill_proxy(self) -> None:
        assert self._proxy is not None
        _kill(self._proxy.pid)

    def end_server(self, number: int) -> None:
        """Send SIGTERM and wait for the exit; the supervisor restarts the server."""
        self._going.add(number)
        self.servers[number].stop()
        self._going.remove(number)

    def healthy(self) -> bool:
        """Whether all models respond, directly and through the proxy."""
        return all(self._answers(url) for url in (*(server.grpc_url for server in self.servers), self.url))

    def wait_until_healthy(self, timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not self.healthy():
            if time.monotonic() > end:
                raise TimeoutError(f"the cluster was not healthy after {timeout_s:g} s")
            time.sleep(POLL_S)

    def _start_server(self, number: int) -> TritonServer:
        grpc, http = self._ports[number]
        tls = {} if self._keys is None else self._keys.of_server
        server = TritonServer(config=self._config, grpc_port=grpc, http_port=http, **tls)
        return server.__enter__()

    def _start_proxy(self) -> None:
        command = [self._haproxy, "-db", "-q", "-f", str(PROXY), "-f", str(self._list)]
        self._proxy = subprocess.Popen(command, env=os.environ | self._addresses)

    def _watch_server(self, number: int) -> None:
        while not self._stopping.wait(POLL_S):
            lives = self._answers(self.servers[number].grpc_url)
            if not (lives or number in self._going or self._stopping.is_set()):
                self.servers[number].kill()
                self.servers[number] = self._start_server(number)
                self.restarts += 1

    def _watch_proxy(self) -> None:
        while not self._stopping.wait(POLL_S):
            assert self._proxy is not None
            if self._proxy.poll() is not None:
                self._start_proxy()
                self.restarts += 1

    def _answers(self, url: str) -> bool:
        tls, token = (None, None) if self._keys is None else (self._keys.client, self._keys.token)
        try:
            probe(url, PROBE_S, tls, token)
        except RequestError:  # a refusal is a response
            return True
        except ConnectionError:
            return False
        return True

    def _stop(self) -> None:
        self._stopping.set()
        for thread in self._supervisors:
            thread.join()
        if self._proxy is not None:
            self._proxy.kill()
            self._proxy.wait()
        for server in self.servers:
            server.stop()
        self._stack.close()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        listeners = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in listeners:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in listeners]
