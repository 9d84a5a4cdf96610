# SPDX-License-Identifier: Apache-2.0
"""The Kubernetes manifests: rendered, they fit together, and their numbers keep what they promise."""

from __future__ import annotations

import copy
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.checks import tools
from deploy.checks.dockerfiles import ROOT
from deploy.checks.manifests import VERSIONS, Document, can_validate, overlays, render, schema_errors
from deploy.checks.references import PROBES, reference_errors
from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor.machine import region_bytes
from longlive_serve.triton_server.arguments import server_parser
from longlive_serve.triton_server.launcher import EXIT_SLACK_S
from tests.support.deployment import (
    ADAPTER,
    DEMO_SETTINGS,
    DEPLOY,
    GPU_SETTINGS,
    PROXY,
    compose_services,
    manifests,
    recordings,
    the,
)

KUSTOMIZE = tools.kustomize()
needs_kustomize = pytest.mark.skipif(
    KUSTOMIZE is None, reason="needs kubectl or kustomize (`make deploy-check` fetches it)"
)


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = the("StatefulSet", manifests("base/server.yaml"))["spec"]["template"]["spec"]
    return spec


@pytest.fixture(scope="module")
def policy() -> dict[str, Any]:
    return tomllib.loads((DEPLOY / "policy.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Document]]:
    assert KUSTOMIZE is not None
    return {folder.name: render(folder, KUSTOMIZE) for folder in overlays()}


@needs_kustomize
def test_the_documents_of_every_overlay_fit_together(rendered: dict[str, list[Document]]) -> None:
    assert rendered.keys() == {"autoscaled", "autoscaled-keda", "cpu-demo", "gateway", "single-gpu"}
    for name, found in rendered.items():
        assert reference_errors(found) == [], name
        kinds = {one["kind"] for one in found}
        assert ("ScaledObject" in kinds, "HorizontalPodAutoscaler" in kinds) == {
            "autoscaled": (False, True),
            "autoscaled-keda": (True, False),
            "gateway": (False, True),
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
        ("NetworkPolicy", "longlive", "spec.podSelector.matchLabels", {"app.kubernetes.io/name": "longlife"}),
        ("NetworkPolicy", "longlive", "spec.ingress.0.ports.0.port", "grcp"),
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
    assert len(reference_errors(found)) == 1


@needs_kustomize
@pytest.mark.skipif(not can_validate(), reason="needs kubernetes-validate (extra `dev`)")
def test_a_key_that_kubernetes_does_not_know_is_found(rendered: dict[str, list[Document]]) -> None:
    found = copy.deepcopy(rendered["autoscaled-keda"])
    probe = the("StatefulSet", found)["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]
    probe["periodSecond"] = probe.pop("periodSeconds")
    trigger = the("ScaledObject", found)["spec"]["triggers"][0]["metadata"]
    trigger["treshold"] = trigger.pop("threshold")
    for version in VERSIONS:
        wrong = [fault for one in found for fault in schema_errors(one, version)]
        assert len(wrong) == 2
        assert "periodSecond" in wrong[0] + wrong[1]
        assert "treshold" in wrong[0] + wrong[1]


def test_a_pod_has_time_to_drain_and_to_start(pod: dict[str, Any], policy: dict[str, Any]) -> None:
    (server,) = pod["containers"]
    args = server_parser().parse_args(server["args"])
    hook = server["lifecycle"]["preStop"]["exec"]["command"]
    waits = float(hook[-1].partition("=")[2])
    assert waits == policy["drain"]["grace_period_s"]
    assert pod["terminationGracePeriodSeconds"] >= waits + args.drain_timeout_s + EXIT_SLACK_S + 10
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] > args.ready_timeout_s
    for kind in PROBES:
        command = server[kind]["exec"]["command"]
        assert "--ready" not in command, "a full server is not unready"
        assert server[kind]["timeoutSeconds"] >= float(command[-1].partition("=")[2]) + 5, "Python has to start as well"
    compose = compose_services()["compose.yaml: server"]
    assert (
        int(compose["stop_grace_period"][:-1])
        > server_parser().parse_args(compose["command"]).drain_timeout_s + EXIT_SLACK_S
    )
    proxy = the("Deployment", manifests("base/proxy.yaml"), "longlive-proxy")["spec"]["template"]["spec"]
    (waits_of_proxy,) = re.findall(r"hard-stop-after (\d+)s", (PROXY / "haproxy.cfg").read_text(encoding="utf-8"))
    before = int(proxy["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert proxy["terminationGracePeriodSeconds"] >= int(waits_of_proxy) + before + 5


def test_shared_memory_is_enough_for_the_full_size(pod: dict[str, Any]) -> None:
    (shm,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
    assert shm["medium"] == "Memory"
    most = max(region_bytes(config) for config in PRESETS.values())
    assert int(shm["sizeLimit"].removesuffix("Mi")) * 2**20 > 2 * most
    assert int(compose_services()["compose.yaml: server"]["shm_size"].removesuffix("m")) * 10**6 > 2 * most


def test_the_settings_name_what_is_prepared() -> None:
    settings = ServeConfig.from_toml(GPU_SETTINGS)
    script = (DEPLOY / "prepare.sh").read_text(encoding="utf-8")
    assert settings.preset in script
    assert settings.weights == "/cache/weights/longlive"
    assert f"ENGINES={settings.tensorrt_engines}" in script
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


def test_both_autoscalers_scale_by_the_metrics_and_rates_of_the_policy(policy: dict[str, Any]) -> None:
    hpa = the("HorizontalPodAutoscaler", manifests("overlays/autoscaled/autoscaler.yaml"))["spec"]
    keda = the("ScaledObject", manifests("overlays/autoscaled-keda/scaledobject.yaml"))["spec"]
    for behavior in (hpa["behavior"], keda["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]):
        assert behavior["scaleUp"]["selectPolicy"] == "Max"
        for direction in ("up", "down"):
            assert scaling(behavior, direction) == policy[f"scale_{direction}"]
    names = {"longlive_busy_share", "longlive_late_share"}
    metrics = [metric["external"] for metric in hpa["metrics"]]
    assert {one["target"]["type"] for one in metrics} == {"Value"}
    assert {one["metric"]["name"] for one in metrics} == names
    assert {one["metricType"] for one in keda["triggers"]} == {"Value"}
    queries = {one["metadata"]["query"].partition("{")[0] for one in keda["triggers"]}
    assert queries == {f"namespace:{name}" for name in names}
    adapter = yaml.safe_load(ADAPTER.read_text(encoding="utf-8"))
    handed_on = {one["name"]["as"]: one["seriesQuery"] for one in adapter["rules"]["external"]}
    assert handed_on == {name: f"namespace:{name}" for name in names}
    assert queries <= recordings().keys()
