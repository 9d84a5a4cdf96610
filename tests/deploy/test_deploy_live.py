# SPDX-License-Identifier: Apache-2.0
"""deploy/ against a live server: the proxy before it, the metrics that are asked for, what a drain sees of sessions."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deploy.checks import tools
from longlive_client.cli.health import probe
from longlive_client.errors import ForbiddenError
from longlive_client.grpc_transport import Tls, auth_metadata, channel
from longlive_client.video_stream import VideoStream
from longlive_serve.observability.metrics import sessions_at
from longlive_serve.protocol.messages import CLIENT_HEADER, MODEL_NAME, READY, SESSION_HEADER
from longlive_serve.triton_server.launcher import TritonServer
from stress.haproxy_cluster import STICKY, _free_ports
from stress.test_pki import Keys
from tests.fakes.service_bench import LIMIT_S, wait_until
from tests.support.deployment import PROXY, dcgm_counters, manifests, queried_metrics, recordings, the
from tests.support.live import metric

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
    found = re.findall(r"server longlive-\d+ (\S+)", server_list.read_text(encoding="utf-8"))
    service = the("Service", manifests("base/services.yaml"))["metadata"]["name"]
    name = the("StatefulSet", manifests("base/server.yaml"))["metadata"]["name"]
    assert found == [f"{name}-{n}.{service}.longlive.svc.cluster.local:8001" for n in range(3)]


def test_the_proxy_goes_by_the_names_of_the_wire() -> None:
    text = (PROXY / "haproxy.cfg").read_text(encoding="utf-8")
    assert f"balance hdr({SESSION_HEADER})" in text
    assert text.count(f"set-header {CLIENT_HEADER} ") == text.count("set-header") == 1
    assert f"/v2/models/{MODEL_NAME}/ready" in text


def test_every_list_of_servers_keeps_sessions_where_they_are(server_list: Path) -> None:
    assert f"hdr({SESSION_HEADER})" in STICKY
    assert STICKY in (PROXY / "haproxy.cfg").read_text(encoding="utf-8")
    for servers in (server_list, PROXY / "compose.cfg"):
        assert f"backend servers\n{STICKY}\n" in servers.read_text(encoding="utf-8")


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    found = Keys(tmp_path / "keys")
    found.make()
    return found


@needs_haproxy
def test_haproxy_takes_its_configuration(server_list: Path, keys: Keys) -> None:
    every = keys.of_proxy("127.0.0.1:8443")
    for servers in (server_list, PROXY / "compose.cfg"):
        for left_out in (set(every), {"LONGLIVE_TLS_CLIENT_CA"}, {"LONGLIVE_SERVERS_CA"}, set()):
            environment = {name: value for name, value in every.items() if name not in left_out}
            command = [str(HAPROXY), "-c", "-f", str(PROXY / "haproxy.cfg"), "-f", str(servers)]
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def running_proxy(folder: Path, server: str, **environment: str) -> Iterator[tuple[str, str, str]]:
    """A proxy before `server`, as its line says; yields where it listens: in the clear, with TLS, for metrics."""
    (folder / "servers.cfg").write_text(f"backend servers\n{STICKY}\n  server s {server}\n")
    plain, tls, status = (f"127.0.0.1:{port}" for port in _free_ports(3))
    addresses = {"LONGLIVE_PROXY": plain, "LONGLIVE_PROXY_TLS": tls, "LONGLIVE_PROXY_STATUS": status}
    command = [str(HAPROXY), "-db", "-q", "-f", str(PROXY / "haproxy.cfg"), "-f", str(folder / "servers.cfg")]
    process = subprocess.Popen(command, env=os.environ | addresses | environment)
    try:
        wait_until(lambda: is_up(f"http://{status}/metrics"))
        yield plain, tls, status
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return bool(metrics_at(url))
    except OSError:
        return False


@pytest.fixture
def proxy(server: TritonServer, keys: Keys) -> Iterator[str]:
    """Where a proxy listens that lets in who shows a certificate and a token, three times in ten seconds."""
    line = f"{server.grpc_url} check port {server.http_url.partition(':')[2]}"
    environment = keys.of_proxy("") | {"LONGLIVE_PROXY_RATE": "3"}
    of_servers = [name for name in environment if name.startswith(("LONGLIVE_SERVERS", "LONGLIVE_PROXY_TLS"))]
    with running_proxy(keys.folder, line, **{k: v for k, v in environment.items() if k not in of_servers}) as urls:
        yield urls[1]


def watch(url: str, keys: Keys, token: str | None) -> int:
    with VideoStream("a fox", url=url, chunks=2, pace="asap", tls=keys.client, access_token=token) as video:
        return len(list(video.chunks()))


@needs_haproxy
def test_the_proxy_lets_in_who_shows_a_certificate_and_a_token(proxy: str, keys: Keys) -> None:
    assert probe(proxy, LIMIT_S, keys.client, keys.token) == READY
    assert watch(proxy, keys, keys.token) == 2
    for token in (None, "wrong", f"{keys.token}."):
        with pytest.raises(ConnectionError, match="no valid access token"):
            probe(proxy, LIMIT_S, keys.client, token)
        with pytest.raises(ForbiddenError, match="no valid access token"):
            watch(proxy, keys, token)
    with pytest.raises(ConnectionError, match="UNAVAILABLE"):
        probe(proxy, 2, Tls(ca=keys.folder / "ca.crt"), keys.token)


@needs_haproxy
def test_the_proxy_lets_nobody_have_more_than_his_share(proxy: str, keys: Keys) -> None:
    answers = [answer(proxy, keys) for _ in range(12)]
    assert answers[:3] == [READY] * 3
    assert "UNAVAILABLE" in answers
    assert set(answers) == {READY, "UNAVAILABLE"}


def answer(url: str, keys: Keys) -> str:
    try:
        return probe(url, LIMIT_S, keys.client, keys.token)
    except ConnectionError as error:
        return "UNAVAILABLE" if "UNAVAILABLE" in str(error) else str(error)


@needs_haproxy
def test_the_proxy_lets_nothing_through_but_streams(proxy: str, keys: Keys) -> None:
    with channel(proxy, keys.client) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        for call, request in (
            (stub.SystemSharedMemoryStatus, service_pb2.SystemSharedMemoryStatusRequest()),
            (stub.RepositoryIndex, service_pb2.RepositoryIndexRequest()),
            (stub.ModelInfer, service_pb2.ModelInferRequest(model_name=MODEL_NAME)),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=LIMIT_S, metadata=auth_metadata(keys.token))
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


@pytest.fixture(scope="module")
def exported(server: TritonServer) -> set[str]:
    """What a server exports that has played a video with a prompt switch, and what a proxy does."""
    with VideoStream("a fox", url=server.grpc_url, seed=1, chunks=1, pace="asap") as video:
        video.switch_prompt("an owl")
        video.request_chunks(2)
        assert list(video.chunks())
    wait_until(lambda: metric(server, "live_sessions") == 0)  # which is told after all that the session has done
    return metrics_at(f"http://{server.metrics_url}/metrics")


def metrics_at(url: str) -> set[str]:
    with urllib.request.urlopen(url, timeout=LIMIT_S) as response:
        lines = response.read().decode().splitlines()
    return {re.split(r"[{ ]", line, maxsplit=1)[0] for line in lines if line and not line.startswith("#")}


@pytest.fixture(scope="module")
def exported_by_proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    if HAPROXY is None:
        pytest.skip("needs haproxy (Debian, Ubuntu: apt-get install haproxy)")
    with running_proxy(tmp_path_factory.mktemp("proxy"), "127.0.0.1:1 check port 1") as (_, _, status):
        yield metrics_at(f"http://{status}/metrics")


def test_every_metric_that_is_asked_for_is_exported_or_recorded(exported: set[str]) -> None:
    known = exported | dcgm_counters() | EXTERNAL | recordings().keys()
    missing = {metric: where for metric, where in queried_metrics().items() if metric not in known}
    assert {name for name in missing if not name.startswith("haproxy_")} == set()


def test_every_figure_of_ours_is_looked_at(exported: set[str]) -> None:
    ours = {name for name in exported if name.startswith("longlive_")}
    assert ours - queried_metrics().keys() <= {
        f"longlive_{name}_seconds_{part}" for name in ("chunk", "first_frame", "switch") for part in ("sum", "count")
    }


def test_every_metric_of_the_proxy_is_exported(exported_by_proxy: set[str]) -> None:
    assert {name for name in queried_metrics() if name.startswith("haproxy_")} <= exported_by_proxy


def test_a_drain_counts_the_sessions_of_a_live_server(server: TritonServer) -> None:
    url = f"http://{server.metrics_url}/metrics"
    assert sessions_at(url) == 0
    with VideoStream("a fox", url=server.grpc_url, seed=1, fps=1) as video:
        assert next(video.chunks()) is not None
        assert sessions_at(url) == 1
    assert sessions_at("http://127.0.0.1:1/metrics") is None
