# SPDX-License-Identifier: Apache-2.0
"""deploy/ against a live server: the proxy before it, the metrics that are asked for, what a drain sees of sessions."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from client.channel import Tls
from client.probe import probe
from client.video_stream import VideoStream
from deploy import drain, tools
from deploy.queries import dcgm_counters, rules
from longlive_serve.protocol import CLIENT_HEADER, MODEL_NAME, READY, SESSION_HEADER
from longlive_serve.server import TritonServer
from tests.deployment import (
    PROXY,
    asked_for,
    manifests,
    the,
)
from trials.cluster import _free_ports

HAPROXY = tools.find("haproxy")
EXTERNAL = {"up", "ALERTS"}  # Prometheus' own

needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy (Debian, Ubuntu: apt-get install haproxy)")


@pytest.fixture
def server_list(tmp_path: Path) -> Path:
    path = tmp_path / "servers.cfg"
    environment = os.environ | {"SERVERS": "3", "NAMESPACE": "longlive"}
    subprocess.run(["sh", str(PROXY / "servers.sh"), str(path)], env=environment, check=True)
    return path


def test_the_proxies_list_the_pods_by_their_names(server_list: Path) -> None:
    found = re.findall(r"server longlive-\d+ (\S+)", server_list.read_text())
    service = the("Service", manifests("base/services.yaml"))["metadata"]["name"]
    name = the("StatefulSet", manifests("base/server.yaml"))["metadata"]["name"]
    assert found == [f"{name}-{n}.{service}.longlive.svc.cluster.local:8001" for n in range(3)]


def test_the_proxy_goes_by_the_names_of_the_wire() -> None:
    text = (PROXY / "haproxy.cfg").read_text()
    assert f"balance hdr({SESSION_HEADER})" in text
    assert text.count(f"set-header {CLIENT_HEADER} ") == text.count("set-header") == 2
    assert f"/v2/models/{MODEL_NAME}/ready" in text


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with an authority, and certificates that it has signed: of the proxy and of a client."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    for name, host in (("tls", "127.0.0.1"), ("client", "viewer.example.org")):
        issued = authority.issue_cert(host)
        issued.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
        issued.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    return tmp_path


@needs_haproxy
def test_haproxy_takes_its_configuration(server_list: Path, certificates: Path) -> None:
    tls = {"LONGLIVE_TLS_CERT": str(certificates / "tls.crt"), "LONGLIVE_PROXY": "127.0.0.1:8080"}
    mutual = tls | {"LONGLIVE_TLS_CLIENT_CA": str(certificates / "ca.crt")}
    for servers in (server_list, PROXY / "compose.cfg"):
        for environment in ({}, tls, mutual):
            command = [str(HAPROXY), "-c", "-f", str(PROXY / "haproxy.cfg"), "-f", str(servers)]
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running_proxy(folder: Path, server: str, **environment: str) -> Iterator[tuple[str, str, str]]:
    """A proxy before `server`, as its line says; yields where it listens: in the clear, with TLS, for metrics."""
    (folder / "servers.cfg").write_text(f"backend servers\n  server s {server}\n")
    plain, tls, status = (f"127.0.0.1:{port}" for port in _free_ports(3))
    addresses = {"LONGLIVE_PROXY": plain, "LONGLIVE_PROXY_TLS": tls, "LONGLIVE_PROXY_STATUS": status}
    command = [str(HAPROXY), "-db", "-q", "-f", str(PROXY / "haproxy.cfg"), "-f", str(folder / "servers.cfg")]
    process = subprocess.Popen(command, env=os.environ | addresses | environment)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                metrics_at(f"http://{status}/metrics")
                break
            except OSError:
                assert time.monotonic() < deadline, "the proxy did not start"
                time.sleep(0.1)
        yield plain, tls, status
    finally:
        process.kill()
        process.wait()


@needs_haproxy
def test_the_proxy_lets_in_who_shows_a_certificate(server: TritonServer, certificates: Path) -> None:
    line = f"{server.grpc_url} check port {server.http_url.partition(':')[2]}"
    ca = str(certificates / "ca.crt")
    files = {"LONGLIVE_TLS_CERT": str(certificates / "tls.crt"), "LONGLIVE_TLS_CLIENT_CA": ca}
    with running_proxy(certificates, line, **files) as (plain, tls, _):
        assert probe(plain, 10) == READY
        assert probe(tls, 10, Tls(ca=ca, cert=certificates / "client.crt", key=certificates / "client.key")) == READY
        with pytest.raises(ConnectionError):
            probe(tls, 2, Tls(ca=ca))


@pytest.fixture(scope="module")
def exported(server: TritonServer) -> set[str]:
    """What a server exports that has played a video with a prompt switch, and what a proxy does."""
    with VideoStream("a fox", url=server.grpc_url, seed=1, chunks=3, pace="asap") as video:
        video.switch_prompt("an owl")
        assert list(video.chunks())
    time.sleep(0.5)  # figures are told by a thread of their own
    return metrics_at(f"http://{server.metrics_url}/metrics")


def metrics_at(url: str) -> set[str]:
    with urllib.request.urlopen(url, timeout=10) as response:
        lines = response.read().decode().splitlines()
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def exported_by_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    if HAPROXY is None:
        pytest.skip("needs haproxy (Debian, Ubuntu: apt-get install haproxy)")
    with running_proxy(tmp_path_factory.mktemp("proxy"), "127.0.0.1:1 check port 1") as (_, _, status):
        yield metrics_at(f"http://{status}/metrics")


def test_every_metric_that_is_asked_for_is_exported_or_recorded(exported: set[str]) -> None:
    known = exported | dcgm_counters() | EXTERNAL | {rule.record for rule in rules()}
    missing = {metric: where for metric, where in asked_for().items() if metric not in known}
    assert {name for name in missing if not name.startswith("haproxy_")} == set()


def test_every_figure_of_ours_is_looked_at(exported: set[str]) -> None:
    ours = {name for name in exported if name.startswith("longlive_")}
    assert ours - asked_for().keys() <= {
        f"longlive_{name}_seconds_{part}" for name in ("chunk", "first_frame", "switch") for part in ("sum", "count")
    }


def test_every_metric_of_the_proxy_is_exported(exported_by_proxy: set[str]) -> None:
    assert {name for name in asked_for() if name.startswith("haproxy_")} <= exported_by_proxy


def test_a_drain_counts_the_sessions_of_a_live_server(server: TritonServer) -> None:
    url = f"http://{server.metrics_url}/metrics"
    assert drain.sessions(url) == 0
    with VideoStream("a fox", url=server.grpc_url, seed=1, fps=1) as video:
        assert next(video.chunks()) is not None
        assert drain.sessions(url) == 1
    assert drain.sessions("http://127.0.0.1:1/metrics") is None
