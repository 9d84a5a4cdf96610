# SPDX-License-Identifier: Apache-2.0
"""deploy/: what it names exists, what its numbers promise holds, and its queries ask for what a live server exports.

What takes tools that are not everybody's is in `make deploy-check`.
"""

from __future__ import annotations

import copy
import os
import re
import subprocess
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
import yaml

from client.video_stream import VideoStream
from deploy import drain, tools
from deploy.images import DOCKERFILES, ROOT, faults, stages
from deploy.loose_ends import loose_ends
from deploy.manifests import KUBERNETES, VERSIONS, Document, can_validate, documents, overlays, render, schema_faults
from deploy.queries import dashboard_queries, dcgm_counters, metrics_in, rules
from longlive_serve.config import PRESETS, ServeConfig
from longlive_serve.doctor.machine import region_bytes
from longlive_serve.protocol import CLIENT_HEADER, MODEL_NAME, SESSION_HEADER
from longlive_serve.server import EXIT_SLACK_S, TritonServer, _arguments
from trials.cluster import _free_ports

DEPLOY = ROOT / "deploy"
PROXY = DEPLOY / "proxy"
GPU_SETTINGS = KUBERNETES / "components/gpu/serve.toml"
DEMO_SETTINGS = KUBERNETES / "overlays/cpu-demo/serve.toml"
OWN_IMAGE = "longlive-serve"
KUSTOMIZE, HAPROXY = tools.kustomize(), tools.find("haproxy")
EXTERNAL = {"up", "ALERTS"}  # Prometheus' own

needs_kustomize = pytest.mark.skipif(KUSTOMIZE is None, reason="needs kubectl or kustomize")
needs_haproxy = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy (Debian, Ubuntu: apt-get install haproxy)")


def manifests(*paths: str) -> list[Document]:
    """The documents of files as they stand, not rendered."""
    return [document for path in paths for document in documents((KUBERNETES / path).read_text())]


def the(kind: str, found: list[Document], name: str = "longlive") -> Document:
    (one,) = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return one


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = the("StatefulSet", manifests("base/server.yaml"))["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def policy() -> dict[str, Any]:
    return tomllib.loads((DEPLOY / "policy.toml").read_text())


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    assert KUSTOMIZE is not None
    return {folder.name: render(folder, KUSTOMIZE) for folder in overlays()}


def compose_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = {}
    for name in ("compose.yaml", "compose.gpu.yaml"):
        for service, settings in yaml.safe_load((DEPLOY / name).read_text())["services"].items():
            services[f"{name}: {service}"] = settings
    return services


# --- what is named exists ---


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_dockerfiles_keep_the_rules(path: Path) -> None:
    assert faults(path) == []


def test_a_dockerfile_that_breaks_the_rules_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nADD http://x y\nCOPY nothing .\nUSER root\nENTRYPOINT run\n")
    (tmp_path / "Dockerfile.dockerignore").write_text("*\n")
    text = "\n".join(faults(tmp_path / "Dockerfile"))
    for word in ("no version", "ADD", "no such file", "hides it", "USER", "ENTRYPOINT", "HEALTHCHECK", "STOPSIGNAL"):
        assert word in text


def modules_in(dockerfile: Path) -> set[str]:
    """The folders that `python3 -m` finds in an image: those copied, and the package in the wheel."""
    copied = {source.partition("/")[0] for copy in stages(dockerfile)[-1].copies for source in copy.sources}
    return copied | {"longlive_serve"}


def check_command(command: list[str], dockerfile: Path) -> None:
    """That a command for our image names what is there, with options that it has."""
    if command[0].endswith(".sh"):
        assert (
            f"COPY deploy/__init__.py deploy/drain.py deploy/{Path(command[0]).name} deploy/" in dockerfile.read_text()
        )
        assert os.access(DEPLOY / Path(command[0]).name, os.X_OK), "a hook needs the right to be run"
        return
    assert command[:2] == ["python3", "-m"], command
    module = command[2]
    assert module.partition(".")[0] in modules_in(dockerfile), module
    source = ROOT / f"{module.replace('.', '/')}.py"
    if module == "longlive_serve.server":
        _arguments(command[3:])
        return
    for option in command[3:]:
        assert f'"{option.partition("=")[0]}"' in source.read_text(), f"{module} has no {option}"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_entry_and_health_check_are_commands_of_ours(path: Path) -> None:
    last = stages(path)[-1]
    entry, health = last.last("ENTRYPOINT"), last.last("HEALTHCHECK")
    assert entry is not None
    assert health is not None
    check_command(entry.words, path)
    check_command(yaml.safe_load(health.text.partition("CMD ")[2]), path)
    assert _arguments(entry.words[3:]).host == "0.0.0.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for stage in stages(path):
        assert set(filter(None, stage.arguments().get("EXTRAS", "").split(","))) <= extras.keys()


def test_every_command_in_a_pod_exists() -> None:
    found = [one for path in KUBERNETES.rglob("*.yaml") for one in documents(path.read_text()) if "spec" in one]
    pods = [one["spec"] if one["kind"] == "Pod" else one["spec"].get("template", {}).get("spec", {}) for one in found]
    checked = 0
    for container in [c for pod in pods for c in (*pod.get("initContainers", []), *pod.get("containers", []))]:
        if not container.get("image", "").startswith(OWN_IMAGE):
            continue
        hooks = [
            container[probe] for probe in ("startupProbe", "readinessProbe", "livenessProbe") if probe in container
        ]
        hooks += container.get("lifecycle", {}).values()
        commands = [hook["exec"]["command"] for hook in hooks]
        commands += [container["command"]] if container.get("command", ["sleep"])[0] != "sleep" else []
        for command in commands:
            check_command(command, DOCKERFILES[0])
            if not command[0].endswith(".sh"):
                check_command(command, DOCKERFILES[1])
        _arguments(container.get("args", []))
        checked += len(commands)
    assert checked == 5


def test_every_file_in_compose_exists() -> None:
    for name, service in compose_services().items():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), name
        if "entrypoint" in service:
            check_command(service["entrypoint"], DOCKERFILES[0])
        assert ":" in service["image"], name
    _arguments(compose_services()["compose.yaml: server"]["command"])
    for path in (DEPLOY / "grafana/provisioning").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1


def test_the_images_are_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = "\n".join(path.read_text() for path in (*KUBERNETES.rglob("*.yaml"), *DEPLOY.glob("compose*.yaml")))
    tags = set(re.findall(rf"{OWN_IMAGE}(?::|, newTag: )([\w.-]+)", text))
    assert tags == {version, f"{version}-cpu"}
    assert len(set(re.findall(r"image: (haproxy:[\w.]+)", text))) == 1


def test_prepare_runs_conversions_that_exist_and_does_nothing_twice(tmp_path: Path) -> None:
    script = (DEPLOY / "prepare.sh").read_text()
    for module, options in re.findall(r"python3 -m (export\.\w+)((?: .*)?)$", script, re.MULTILINE):
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        for option in re.findall(r"--[a-z-]+", options):
            assert f'"{option}"' in source, f"{module} has no {option}"
    tools_of = tmp_path / "bin"
    tools_of.mkdir()
    (tools_of / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (tools_of / "python3").write_text(
        '#!/bin/sh\necho "$2" >> "$LOG"\nwhat=$2 out=\nfor word; do test "$out" = --out && out=$word\n'
        'test "$word" = --out && out=--out\ndone\ncase $what in export.*) mkdir -p "$out" ;; *) echo 10.16 ;; esac\n'
        'test "$what" != export.convert || echo {} > "$out/config.json"\n'
    )
    for tool in tools_of.iterdir():
        tool.chmod(0o755)
    settings = {"CACHE": str(tmp_path / "cache"), "PLANS": str(tmp_path / "run/plans"), "CONFIG": str(GPU_SETTINGS)}
    environment = settings | {"PATH": f"{tools_of}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    for _ in range(2):
        subprocess.run(["sh", str(DEPLOY / "prepare.sh")], env=environment, check=True)
    called = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("export")]
    assert called == ["export.convert", "export.to_onnx", "export.to_tensorrt", "export.convert", "export.to_tensorrt"]
    plans = (tmp_path / "run/plans").resolve()
    assert plans.parent == tmp_path / "cache/plans"
    assert plans.name.endswith("-NVIDIA-H200-10.16")


def test_the_page_on_deployment_names_what_exists() -> None:
    text = (ROOT / "docs/deploy.md").read_text()
    for path in re.findall(r"(?<![\w/.~-])deploy/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:components|overlays|base)/[\w./-]+)`", text):
        assert (KUBERNETES / name).exists(), name
    for verb in re.findall(r"make ([a-z-]+)", text):
        assert f"\n{verb}:" in (ROOT / "Makefile").read_text(), verb


# --- manifests ---


@needs_kustomize
def test_the_documents_of_every_overlay_fit_together(rendered: dict[str, list[Document]]) -> None:
    assert rendered.keys() == {"autoscaled", "autoscaled-keda", "cpu-demo", "single-gpu"}
    for name, found in rendered.items():
        assert loose_ends(found) == [], name
        kinds = {one["kind"] for one in found}
        assert ("ScaledObject" in kinds, "HorizontalPodAutoscaler" in kinds) == {
            "autoscaled": (False, True),
            "autoscaled-keda": (True, False),
        }.get(name, (False, False))


@needs_kustomize
@pytest.mark.parametrize(
    ("kind", "name", "path", "wrong"),
    [
        ("PodDisruptionBudget", "longlive", "spec.selector.matchLabels", {"app.kubernetes.io/name": "longlife"}),
        ("StatefulSet", "longlive", "spec.template.spec.priorityClassName", "longlive-life"),
        ("StatefulSet", "longlive", "spec.template.spec.containers.0.image", "longlive-serve"),
        ("StatefulSet", "longlive", "spec.template.spec.containers.0.securityContext.readOnlyRootFilesystem", False),
        ("Service", "longlive-proxy", "spec.ports.0.targetPort", "grcp"),
        ("HorizontalPodAutoscaler", "longlive", "spec.scaleTargetRef.name", "longlife"),
    ],
)
def test_a_name_that_nothing_goes_by_is_found(
    rendered: dict[str, list[Document]], kind: str, name: str, path: str, wrong: Any
) -> None:
    found = copy.deepcopy(rendered["autoscaled"])
    *parents, last = path.split(".")
    place: Any = the(kind, found, name)
    for step in parents:
        place = place[int(step)] if step.isdigit() else place[step]
    place[last] = wrong
    assert len(loose_ends(found)) == 1


@needs_kustomize
@pytest.mark.skipif(not can_validate(), reason="needs kubernetes-validate (extra `deploy-check`)")
def test_a_key_that_kubernetes_does_not_know_is_found(rendered: dict[str, list[Document]]) -> None:
    found = copy.deepcopy(rendered["autoscaled-keda"])
    probe = the("StatefulSet", found)["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    probe["periodSecond"] = probe.pop("periodSeconds")
    trigger = the("ScaledObject", found)["spec"]["triggers"][0]["metadata"]
    trigger["treshold"] = trigger.pop("threshold")
    for version in VERSIONS:
        wrong = [fault for one in found for fault in schema_faults(one, version)]
        assert len(wrong) == 2
        assert "periodSecond" in wrong[0] + wrong[1]
        assert "treshold" in wrong[0] + wrong[1]


def test_a_pod_has_time_to_drain_and_to_start(pod: dict[str, Any], policy: dict[str, Any]) -> None:
    (server,) = pod["containers"]
    args = _arguments(server["args"])
    hook = server["lifecycle"]["preStop"]["exec"]["command"]
    waits = float(hook[-1].partition("=")[2])
    assert waits == policy["drain"]["grace_period_s"]
    assert pod["terminationGracePeriodSeconds"] >= waits + args.drain_timeout_s + EXIT_SLACK_S + 10
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > args.ready_timeout_s
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        command = server[probe]["exec"]["command"]
        assert "--ready" not in command, "a full server is not unready"
        assert server[probe]["timeoutSeconds"] >= float(command[-1].partition("=")[2]) + 5, (
            "Python has to start as well"
        )
    compose = compose_services()["compose.yaml: server"]
    assert int(compose["stop_grace_period"][:-1]) > _arguments(compose["command"]).drain_timeout_s + EXIT_SLACK_S
    proxy = the("Deployment", manifests("base/proxy.yaml"), "longlive-proxy")["spec"]["template"]["spec"]
    (waits_of_proxy,) = re.findall(r"hard-stop-after (\d+)s", (PROXY / "haproxy.cfg").read_text())
    before = int(proxy["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert proxy["terminationGracePeriodSeconds"] >= int(waits_of_proxy) + before + 5


def test_shared_memory_is_enough_for_the_full_size(pod: dict[str, Any]) -> None:
    (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"
    most = max(region_bytes(config) for config in PRESETS.values())
    assert int(shm["sizeLimit"].removesuffix("Mi")) * 2**20 > 2 * most
    assert int(compose_services()["compose.yaml: server"]["shm_size"].removesuffix("m")) * 10**6 > 2 * most


def test_the_settings_are_those_of_the_policy(policy: dict[str, Any]) -> None:
    settings = ServeConfig.from_toml(GPU_SETTINGS)
    for name, value in policy["service"].items():
        assert getattr(settings, name) == value
    script = (DEPLOY / "prepare.sh").read_text()
    assert settings.preset in script
    assert settings.weights == "/cache/weights/longlive"
    assert f"PLANS={settings.plans}" in script
    demo = ServeConfig.from_toml(DEMO_SETTINGS)
    copied = ROOT / Path(demo.weights).relative_to("/opt/longlive")
    assert copied.is_dir(), "the image of the demo has its weights"


def scaling(behavior: dict[str, Any], direction: str) -> dict[str, Any]:
    found = behavior["scale" + direction.title()]
    return {
        "stabilization_s": found["stabilizationWindowSeconds"],
        "policies": [
            {"type": one["type"], "value": one["value"], "period_s": one["periodSeconds"]} for one in found["policies"]
        ],
    }


def test_both_autoscalers_have_the_numbers_of_the_policy(policy: dict[str, Any]) -> None:
    hpa = the("HorizontalPodAutoscaler", manifests("overlays/autoscaled/autoscaler.yaml"))["spec"]
    keda = the("ScaledObject", manifests("overlays/autoscaled-keda/scaledobject.yaml"))["spec"]
    assert (hpa["minReplicas"], hpa["maxReplicas"]) == (policy["min_replicas"], policy["max_replicas"])
    assert (keda["minReplicaCount"], keda["maxReplicaCount"]) == (policy["min_replicas"], policy["max_replicas"])
    for behavior in (hpa["behavior"], keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]):
        assert behavior["scaleUp"]["selectPolicy"] == "Max"
        for direction in ("up", "down"):
            assert scaling(behavior, direction) == policy[f"scale_{direction}"]
    targets = {f"longlive_{share}_share": policy[f"target_{share}_share"] for share in ("busy", "late")}
    metrics = [metric["external"] for metric in hpa["metrics"]]
    assert {one["target"]["type"] for one in metrics} == {"Value"}
    milli = {one["metric"]["name"]: int(one["target"]["value"].removesuffix("m")) for one in metrics}
    assert milli == {name: round(1000 * target) for name, target in targets.items()}
    assert {one["metricType"] for one in keda["triggers"]} == {"Value"}
    asked = {
        one["metadata"]["query"].partition("{")[0]: float(one["metadata"]["threshold"]) for one in keda["triggers"]
    }
    assert asked == {f"namespace:{name}": target for name, target in targets.items()}
    adapter = yaml.safe_load((KUBERNETES / "overlays/autoscaled/prometheus-adapter.yaml").read_text())
    handed_on = {one["name"]["as"]: one["seriesQuery"] for one in adapter["rules"]["external"]}
    assert handed_on == {name: f"namespace:{name}" for name in targets}
    recorded = {rule.record: rule.query.expression for rule in rules()}
    assert set(handed_on.values()) <= recorded.keys()
    busy = recorded["namespace:longlive_busy_share"]
    assert f"longlive_refused_sessions[{policy['refused_window_s']}s]" in busy
    assert f"{policy['spare_pods']} * {policy['target_busy_share']} * avg by (namespace) (longlive_cap" in busy
    proxy = (KUBERNETES / "overlays/autoscaled/kustomization.yaml").read_text()
    (servers,) = re.findall(r'initContainers/0/env/0/value, value: "(\d+)"', proxy)
    assert int(servers) == policy["max_replicas"], "the proxies list every pod that there may be"


# --- the proxy ---


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


@needs_haproxy
def test_haproxy_takes_its_configuration(server_list: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    cert = authority.issue_cert("localhost")
    cert.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    cert.private_key_pem.write_to_path(tmp_path / "tls.key")
    authority.cert_pem.write_to_path(tmp_path / "ca.crt")
    tls = {"LONGLIVE_TLS_CERT": str(tmp_path / "tls.crt"), "LONGLIVE_PROXY": "127.0.0.1:8080"}
    mutual = tls | {"LONGLIVE_TLS_CLIENT_CA": str(tmp_path / "ca.crt")}
    for servers in (server_list, PROXY / "compose.cfg"):
        for environment in ({}, tls, mutual):
            command = [str(HAPROXY), "-c", "-f", str(PROXY / "haproxy.cfg"), "-f", str(servers)]
            done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


# --- what is watched ---


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
    servers = tmp_path_factory.mktemp("proxy") / "servers.cfg"
    servers.write_text("backend servers\n  server s 127.0.0.1:1 check port 1\n")
    command = [HAPROXY, "-db", "-q", "-f", str(PROXY / "haproxy.cfg"), "-f", str(servers)]
    proxy, status = (f"127.0.0.1:{port}" for port in _free_ports(2))
    environment = os.environ | {"LONGLIVE_PROXY": proxy, "LONGLIVE_PROXY_STATUS": status}
    process = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                yield metrics_at(f"http://{status}/metrics")
                return
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
    finally:
        process.kill()
        process.wait()


def asked_for() -> dict[str, str]:
    """Every metric that rules and dashboard ask for, and where."""
    queries = [*(rule.query for rule in rules()), *dashboard_queries()]
    return {metric: query.where for query in queries for metric in query.metrics}


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


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ('sum by (namespace) (rate(a_total{x="b{c}"}[5m])) / (d:e > 0)', {"a_total", "d:e"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[1m]))) > 2e3", {"a_bucket"}),
        ("a and on (x) b or vector(0) unless c offset 5m", {"a", "b", "c"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, metrics: set[str]) -> None:
    assert metrics_in(expression) == metrics


def test_every_alert_has_its_section_in_the_runbook_and_its_test() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(), re.MULTILINE)
    alerts = [rule for rule in rules() if rule.alert]
    assert sorted(sections) == sorted(rule.alert for rule in alerts)
    tested = yaml.safe_load((DEPLOY / "prometheus/tests.yml").read_text())["tests"]
    cases = [case for test in tested for case in test.get("alert_rule_test", [])]
    for rule in alerts:
        assert rule.runbook_url == f"docs/runbook.md#{rule.alert.lower()}"
        assert rule.severity in ("page", "ticket")
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule.alert}
        assert fires == {True, False}, f"{rule.alert} needs a test in which it fires and one in which it does not"


def test_every_recording_is_used() -> None:
    adapter = (KUBERNETES / "overlays/autoscaled/prometheus-adapter.yaml").read_text()
    asked = asked_for().keys()
    for rule in rules():
        assert not rule.record or rule.record in asked or rule.record in adapter, rule.record


@pytest.mark.skipif(tools.find("promtool") is None, reason="needs promtool")
def test_promtool_takes_the_rules() -> None:
    promtool = str(tools.find("promtool"))
    where = DEPLOY / "prometheus"
    for command in (["config", "prometheus.yml"], ["rules", "recording.rules.yml", "alerts.rules.yml"]):
        subprocess.run([promtool, "check", *command], cwd=where, check=True, capture_output=True)


# --- the drain ---


def test_a_drain_ends_when_the_last_session_has() -> None:
    left = [1, 0, 0]
    assert drain.drain(lambda: left.pop(0), seconds=60, settle_s=0) == 0
    assert left == [0]


def test_a_drain_ends_when_its_time_is_over_or_the_server_is_gone() -> None:
    assert drain.drain(lambda: 3, seconds=0.1, settle_s=0) == 3
    assert drain.drain(lambda: None, seconds=60, settle_s=60) == 0


def test_a_drain_counts_the_sessions_of_a_live_server(server: TritonServer) -> None:
    url = f"http://{server.metrics_url}/metrics"
    assert drain.sessions(url) == 0
    with VideoStream("a fox", url=server.grpc_url, seed=1, fps=1) as video:
        assert next(video.chunks()) is not None
        assert drain.sessions(url) == 1
    assert drain.sessions("http://127.0.0.1:1/metrics") is None
