# SPDX-License-Identifier: Apache-2.0
"""The overlay with Envoy Gateway does for sessions what HAProxy does in the others, and nothing of HAProxy is left."""

from __future__ import annotations

import copy
import inspect
import re
import tomllib
from typing import Any

import pytest
import yaml
from tritonclient.grpc import service_pb2

from deploy.checks import tools
from deploy.checks.manifests import KUBERNETES, VERSIONS, Document, can_validate, render, schema_errors
from deploy.checks.references import reference_errors
from longlive_client.grpc_transport import ENV_NAMES
from longlive_client.video_stream import AsyncVideoStream
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.protocol.messages import CLIENT_HEADER, SESSION_HEADER
from tests.support.deployment import DEPLOY, GPU_SETTINGS, PROXY, manifests, the

KUSTOMIZE = tools.kustomize()
pytestmark = pytest.mark.skipif(KUSTOMIZE is None, reason="needs kubectl or kustomize (`make deploy-check` fetches it)")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
NAMESPACE = "longlive"


@pytest.fixture(scope="module")
def rendered() -> list[Document]:
    assert KUSTOMIZE is not None
    return render(KUBERNETES / "overlays/gateway", KUSTOMIZE)


@pytest.fixture(scope="module")
def backend(rendered: list[Document]) -> dict[str, Any]:
    spec: dict[str, Any] = the("BackendTrafficPolicy", rendered)["spec"]
    return spec


@pytest.fixture(scope="module")
def clients(rendered: list[Document]) -> dict[str, Any]:
    spec: dict[str, Any] = the("ClientTrafficPolicy", rendered)["spec"]
    return spec


@pytest.fixture(scope="module")
def most_pods() -> int:
    return int(tomllib.loads((DEPLOY / "policy.toml").read_text(encoding="utf-8"))["max_replicas"])


def seconds(duration: str) -> float:
    return sum(float(number) * UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|s|m|h)", duration))


def number_of_bytes(quantity: str) -> int:
    return int(quantity[:-2]) * 2 ** {"Ki": 10, "Mi": 20, "Gi": 30}[quantity[-2:]]


def test_nothing_of_haproxy_is_left(rendered: list[Document]) -> None:
    names = {one["metadata"]["name"] for one in rendered}
    assert not any("proxy" in name for name in names), names
    assert {one["kind"] for one in rendered} & {"Deployment", "DaemonSet"} == set()
    assert "haproxy" not in yaml.safe_dump_all(rendered)


def test_a_session_is_known_by_the_header_of_the_wire(backend: dict[str, Any], most_pods: int) -> None:
    assert backend["loadBalancer"]["type"] == "ConsistentHash"
    by = backend["loadBalancer"]["consistentHash"]
    assert by["headers"] == [{"name": SESSION_HEADER}]
    size = by["tableSize"]
    assert size >= 100 * most_pods, "or some pods get noticeably more than others"
    assert all(size % divisor for divisor in range(2, int(size**0.5) + 1)), "Maglev's tables are primes"


def test_only_envoy_says_who_a_client_is(rendered: list[Document], clients: Any, backend: Any) -> None:
    assert clients["headers"]["earlyRequestHeaders"]["remove"] == [CLIENT_HEADER]
    keys = the("SecurityPolicy", rendered)["spec"]["apiKeyAuth"]
    assert keys["forwardClientIDHeader"] == CLIENT_HEADER
    assert keys["extractFrom"] == [{"headers": ["authorization"]}]
    assert keys["sanitize"] is True
    (rule,) = backend["rateLimit"]["local"]["rules"]
    assert rule["clientSelectors"] == [{"headers": [{"name": CLIENT_HEADER, "type": "Distinct"}]}]


def test_only_what_clients_call_is_let_through(rendered: list[Document]) -> None:
    (rule,) = the("GRPCRoute", rendered)["spec"]["rules"]
    let_through = [match["method"] for match in rule["matches"]]
    service = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    assert {one["service"] for one in let_through} == {service.full_name}
    haproxy = (PROXY / "haproxy.cfg").read_text(encoding="utf-8")  # through which test_deploy_live plays videos
    allowed = set(re.findall(rf"unless {{ path /{service.full_name}/(\w+) }}", haproxy))
    assert {one["method"] for one in let_through} == allowed
    assert all(one["type"] == "Exact" for one in let_through)


def test_nothing_ends_a_stream_that_is_alive(rendered: list[Document], clients: Any, backend: Any) -> None:
    heartbeat = inspect.signature(AsyncVideoStream).parameters["heartbeat_s"].default
    http = backend["timeout"]["http"]
    for idle in (http["streamIdleTimeout"], clients["timeout"]["http"]["streamIdleTimeout"]):
        assert seconds(idle) > 1.5 * heartbeat
    assert http["requestTimeout"] == "0s", "Envoy's own is 15 s"
    assert not {"maxStreamDuration", "maxConnectionDuration"} & (http.keys() | clients["timeout"]["http"].keys())
    assert "connectionKeepalive" not in backend["http2"], "Triton answers it with GOAWAY, too many pings"
    shutdown = the("EnvoyProxy", rendered)["spec"]["shutdown"]
    assert seconds(shutdown["minDrainDuration"]) < seconds(shutdown["drainTimeout"])


def test_there_is_room_for_every_stream(backend: dict[str, Any], most_pods: int) -> None:
    settings = ServeConfig.from_toml(GPU_SETTINGS)
    streams = settings.slots + settings.max_waiting
    for limit in backend["circuitBreaker"].values():
        assert limit > most_pods * streams
    window = 64 * 2**10  # of a stream, unless told otherwise
    assert number_of_bytes(backend["http2"]["initialConnectionWindowSize"]) >= 10 * streams * window


def test_pods_hear_the_envoys_of_this_gateway_and_nobody_else(rendered: list[Document]) -> None:
    gateway = the("Gateway", rendered)["metadata"]["name"]
    own = {
        "gateway.envoyproxy.io/owning-gateway-namespace": NAMESPACE,
        "gateway.envoyproxy.io/owning-gateway-name": gateway,
    }
    streams, metrics = the("NetworkPolicy", rendered)["spec"]["ingress"]
    (peer,) = streams["from"]
    assert peer["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "envoy-gateway-system"}
    assert peer["podSelector"]["matchLabels"] == own
    assert streams["ports"] == [{"port": "grpc"}]
    assert metrics["ports"] == [{"port": "metrics"}]
    pod = the("EnvoyProxy", rendered)["spec"]["provider"]["kubernetes"]["envoyDeployment"]["pod"]
    assert pod["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == own
    known = {one["metadata"]["name"] for one in rendered if one["kind"] == "PriorityClass"}
    assert pod["priorityClassName"] in known


def test_envoy_and_pods_speak_the_same_tls(rendered: list[Document]) -> None:
    (server,) = the("StatefulSet", rendered)["spec"]["template"]["spec"]["containers"]
    assert any(argument.startswith("--tls-client-ca=") for argument in server["args"])
    for_probes = {one["name"] for one in server["env"]} & set(ENV_NAMES.values())
    assert for_probes == {ENV_NAMES[name] for name in ("tls-ca", "tls-cert", "tls-key")}
    policy, envoy = the("BackendTLSPolicy", rendered)["spec"], the("EnvoyProxy", rendered)["spec"]
    (authority,) = policy["validation"]["caCertificateRefs"]
    shown = envoy["backendTLS"]["clientCertificateRef"]
    assert shown == {"kind": "Secret", "name": authority["name"], "namespace": NAMESPACE}
    script = (DEPLOY / "certificates.sh").read_text(encoding="utf-8")
    assert re.search(rf"pod\) names=DNS:{policy['validation']['hostname']},", script)
    assert envoy["backendTLS"]["alpnProtocols"] == ["h2"], "health checks offer none by themselves, and gRPC hangs up"


def test_streams_and_tls_are_for_ports_that_there_are(rendered: list[Document]) -> None:
    route, gateway = the("GRPCRoute", rendered)["spec"], the("Gateway", rendered)["spec"]
    assert route["parentRefs"][0]["sectionName"] in {listener["name"] for listener in gateway["listeners"]}
    ports = {port["name"]: port["port"] for port in the("Service", rendered)["spec"]["ports"]}
    (target,) = the("BackendTLSPolicy", rendered)["spec"]["targetRefs"]
    assert route["rules"][0]["backendRefs"][0]["port"] == ports[target["sectionName"]]
    assert the("EnvoyProxy", rendered)["spec"]["routingType"] == "Endpoint", "by the Service's address nothing sticks"


def test_the_patch_of_the_network_policy_knows_what_it_replaces() -> None:
    policy = the("NetworkPolicy", manifests("base/network.yaml"))
    (peer,) = policy["spec"]["ingress"][0]["from"]
    assert peer["podSelector"]["matchLabels"]["app.kubernetes.io/name"] == "longlive-proxy"


def place(found: list[Document], kind: str, path: str) -> tuple[Any, Any]:
    """Where a path leads in the document of a kind: what holds its last step, and that step."""
    *parents, last = path.split(".")
    holder: Any = the(kind, found)["spec"]
    for step in parents:
        holder = holder[int(step)] if step.isdigit() else holder[step]
    return holder, last


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("Gateway", "infrastructure.parametersRef.name"),
        ("Gateway", "listeners.0.tls.certificateRefs.0.name"),
        ("GRPCRoute", "parentRefs.0.name"),
        ("GRPCRoute", "rules.0.backendRefs.0.name"),
        ("ClientTrafficPolicy", "targetRefs.0.name"),
        ("SecurityPolicy", "apiKeyAuth.credentialRefs.0.name"),
        ("BackendTrafficPolicy", "targetRefs.0.kind"),
        ("BackendTLSPolicy", "validation.caCertificateRefs.0.name"),
        ("EnvoyProxy", "backendTLS.clientCertificateRef.name"),
    ],
)
def test_a_name_that_nothing_goes_by_is_found(rendered: list[Document], kind: str, path: str) -> None:
    found = copy.deepcopy(rendered)
    holder, last = place(found, kind, path)
    holder[last] = "longlife"
    assert len(reference_errors(found)) == 1


@pytest.mark.skipif(not can_validate(), reason="needs kubernetes-validate (extra `dev`)")
@pytest.mark.parametrize(
    ("kind", "path", "wrong"),
    [
        ("Gateway", "listeners.0.protocol", "GRPC"),
        ("Gateway", "gatewayClass", "eg"),
        ("GRPCRoute", "rules.0.matches.0.method.typ", "Exact"),
        ("GRPCRoute", "rules.0.backendRefs.0.port", "grpc"),
        ("ClientTrafficPolicy", "timeout.http.streamIdleTimeout", "10 minutes"),
        ("ClientTrafficPolicy", "headers.earlyRequestHeader", {"remove": []}),
        ("SecurityPolicy", "apiKeyAuth.extractFrom.0.headers", []),
        ("SecurityPolicy", "apiKeyAuth.forwardClientIdHeader", "x-client-id"),
        ("BackendTrafficPolicy", "loadBalancer.consistentHash.tableSize", 6_000_000),
        ("BackendTrafficPolicy", "timeout.http.requestTimout", "0s"),
        ("BackendTrafficPolicy", "healthCheck.active.port", 8000),
        ("BackendTLSPolicy", "validation.hostname", "Longlive"),
        ("BackendTLSPolicy", "apiVersion", "v1alpha3"),
        ("EnvoyProxy", "routingType", "Pod"),
        ("EnvoyProxy", "backendTLS.clientCertificateRef", {"kind": "Secret", "name": "longlive-proxy-tls"}),
    ],
)
def test_what_the_apis_do_not_know_is_found(rendered: list[Document], kind: str, path: str, wrong: Any) -> None:
    found = copy.deepcopy(rendered)
    assert [fault for one in found for fault in schema_errors(one, VERSIONS[0])] == []
    holder, last = place(found, kind, path)
    holder[last] = wrong
    (fault,) = [fault for one in found for fault in schema_errors(one, VERSIONS[0])]
    assert fault.startswith(f"{kind}/longlive")
