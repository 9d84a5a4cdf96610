# SPDX-License-Identifier: Apache-2.0
"""Proxies in the environment: this machine is reached past them, other hosts by them, and failures name them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.serving import __main__ as benchmark
from longlive_client.cli import health
from longlive_client.errors import ConnectionLostError
from longlive_client.proxies import ENV_NAMES, EXCEPTIONS, host_of, is_own, open_http, proxy_hint
from longlive_serve.triton_server.launcher import TritonServer
from tests.support.both_streams import Open
from tests.support.live import start_server

ROOT = Path(__file__).parents[2]
ALL = (*ENV_NAMES, "all_proxy", *(name.upper() for name in (*ENV_NAMES, "all_proxy")))


class Proxy:
    """Takes connections, notes the first line of each, and refuses."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://me:secret@127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.makefile("r", encoding="latin-1").readline().strip())
                connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        self._listener.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy()
    for name in (*EXCEPTIONS, *(name.upper() for name in EXCEPTIONS)):
        monkeypatch.delenv(name, raising=False)
    for name in ALL:
        monkeypatch.setenv(name, proxy.url)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module", params=["127.0.0.1", "::1"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with start_server(tmp_path_factory.mktemp("proxies"), host=request.param) as running:
        yield running


def test_this_machine_is_reached_directly(server: TritonServer, proxy: Proxy, stream: Open) -> None:
    with stream("a fox", url=server.grpc_url, chunks=2, pace="asap") as video:
        assert len(list(video.chunks())) == 2
    assert health.main(["--url", server.grpc_url]) == 0
    assert "slots" in benchmark.server_metrics(server.metrics_url)
    assert proxy.asked == []


def test_a_server_starts_and_is_measured(tmp_path: Path, proxy: Proxy) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text('preset = "tiny"\n', encoding="utf-8")
    figures = tmp_path / "figures.json"
    options = ["--serve", f"--config={settings}", "--viewers=1", "--seconds=1", f"--json={figures}"]
    assert benchmark.main([*options, "--prompt=a fox"]) == 0
    assert json.loads(figures.read_text(encoding="utf-8"))
    assert proxy.asked == []


@pytest.mark.parametrize("wanted", [False, True])
def test_onnx_runtime_reports_nothing_to_its_makers_unless_asked_to(tmp_path: Path, wanted: bool) -> None:
    """It writes who it is to the user's folder when it is loaded, and sends some seconds later."""
    code = "from longlive_serve.backends.exported import onnxruntime_session as used; used.onnxruntime.SessionOptions()"
    # Nothing else of this machine's: in some surroundings, such as CI, it reports nothing of itself.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    environment |= {"ORT_DISABLE_TELEMETRY": "0"} if wanted else {}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert bool(list(tmp_path.rglob("*"))) == wanted


@pytest.mark.parametrize("variable", ENV_NAMES)
def test_another_host_is_asked_for_at_the_proxy_and_a_failure_names_the_variable(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, stream: Open, variable: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ALL:
        if name != variable:
            monkeypatch.delenv(name)
    hint = rf"it uses the proxy in \${variable}: unset that, or add models.example to \$no_proxy"
    with pytest.raises(ConnectionLostError, match=hint) as raised:
        list(stream("a fox", url="models.example:8001", chunks=1).__enter__().chunks())
    assert "secret" not in str(raised.value)
    assert health.main(["--url", "models.example:8001"]) == 1
    assert f"it uses the proxy in ${variable}" in capsys.readouterr().err
    assert {line.split()[1] for line in proxy.asked} == {"models.example:8001"}


def test_metrics_of_another_host_are_asked_for_at_the_proxy(proxy: Proxy) -> None:
    with pytest.raises(OSError, match=r"403: Forbidden; it uses the proxy in \$http_proxy"):
        open_http("http://models.example:8002/metrics", timeout_s=60)
    assert proxy.asked == ["GET http://models.example:8002/metrics HTTP/1.1"]


def test_the_first_variable_counts_and_exceptions_do(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "$grpc_proxy" in proxy_hint("models.example:8001")
    monkeypatch.setenv("no_proxy", "localhost,.example")
    assert proxy_hint("models.example:8001") == ""
    assert "$grpc_proxy" in proxy_hint("models.test:8001")
    monkeypatch.setenv("no_grpc_proxy", "models.test")
    assert proxy_hint("models.test:8001") == ""
    assert "$grpc_proxy" in proxy_hint("models.example:8001")
    for name in ENV_NAMES:
        monkeypatch.delenv(name)
    assert proxy_hint("models.example:8001") == ""


@pytest.mark.parametrize(
    ("url", "host", "own"),
    [
        ("127.0.0.1:8001", "127.0.0.1", True),
        ("127.8.9.1:8001", "127.8.9.1", True),
        ("localhost:8001", "localhost", True),
        ("LocalHost.:8001", "LocalHost.", True),
        ("[::1]:8001", "::1", True),
        ("[::ffff:127.0.0.1]:8001", "::ffff:127.0.0.1", True),
        ("0.0.0.0:8001", "0.0.0.0", True),
        ("dns:///127.0.0.1:8001", "127.0.0.1", True),
        ("ipv4:127.0.0.1:8001", "127.0.0.1", True),
        ("ipv6:[::1]:8001", "::1", True),
        ("unix:/run/longlive.sock", "longlive.sock", True),
        ("models.example:8001", "models.example", False),
        ("dns:///models.example:8001", "models.example", False),
        ("models.example", "models.example", False),
        ("192.0.2.1:8001", "192.0.2.1", False),
        ("[2001:db8::1]:8001", "2001:db8::1", False),
        ("127.0.0.1.example:8001", "127.0.0.1.example", False),
        ("localhost.example:8001", "localhost.example", False),
    ],
)
def test_hosts_of_this_machine_are_told_from_others(url: str, host: str, own: bool) -> None:
    assert (host_of(url), is_own(url)) == (host, own)
