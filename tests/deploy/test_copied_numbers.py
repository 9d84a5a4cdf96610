# SPDX-License-Identifier: Apache-2.0
"""Numbers that several files of deploy/ and docs/ repeat: each has one source, and every copy is compared with it.

Kubernetes, Prometheus and pages cannot read policy.toml; a copy that is not here is one that nobody compares.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

import pytest

from deploy.checks.dockerfiles import ROOT
from deploy.drain import DEFAULT_URL
from longlive_serve.triton_server.arguments import server_parser
from tests.project.tensorrt_types import VERSIONS

POLICY: dict[str, Any] = tomllib.loads((ROOT / "deploy/policy.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SERVER = server_parser().parse_args([])
KUBERNETES = "deploy/kubernetes"
AUTOSCALED = f"{KUBERNETES}/overlays/autoscaled"
KEDA = f"{KUBERNETES}/overlays/autoscaled-keda/scaledobject.yaml"
RULES = "deploy/prometheus/recording.rules.yml"
IMAGE = r"longlive-serve(?::|, newTag: )(\d[\w.]*\w)(?:-cpu)?\b"

COPIES: list[tuple[object, dict[str, str]]] = [
    # the source, and where it is copied: what surrounds it, with the number as the group
    (
        POLICY["target_busy_share"],
        {
            KEDA: r'busy_share\{.*\n\s+threshold: "([\d.]+)"',
            RULES: r"(?:to|\*) (0\.\d+)\b",
            "docs/capacity.md": r"`target_busy_share = ([\d.]+)`",
        },
    ),
    (
        f"{round(1000 * POLICY['target_busy_share'])}m",
        {f"{AUTOSCALED}/autoscaler.yaml": r"busy_share\}\n.*value: (\w+)"},
    ),
    (
        POLICY["target_late_share"],
        {
            KEDA: r'late_share\{.*\n\s+threshold: "([\d.]+)"',
            "deploy/prometheus/alerts.rules.yml": r"namespace:longlive_late_share > ([\d.]+)",
        },
    ),
    (
        f"{round(1000 * POLICY['target_late_share'])}m",
        {f"{AUTOSCALED}/autoscaler.yaml": r"late_share\}\n.*value: (\w+)"},
    ),
    (POLICY["spare_pods"], {RULES: r"(?:where |\+ )(\d+) (?:spare|\*)", "docs/capacity.md": r"`spare_pods = (\d+)`"}),
    (POLICY["refused_window_s"], {RULES: r"refused_sessions\[(\d+)s\]"}),
    (
        POLICY["min_replicas"],
        {
            f"{AUTOSCALED}/autoscaler.yaml": r"minReplicas: (\d+)",
            KEDA: r"minReplicaCount: (\d+)",
            "docs/deploy.md": r"(\d+) to \d+ GPUs by",
        },
    ),
    (
        POLICY["max_replicas"],
        {
            f"{AUTOSCALED}/autoscaler.yaml": r"maxReplicas: (\d+)",
            f"{AUTOSCALED}/kustomization.yaml": r'value: "(\d+)"\}  # maxReplicas',
            KEDA: r"maxReplicaCount: (\d+)",
            "docs/deploy.md": r"\d+ to (\d+) GPUs by",
        },
    ),
    (POLICY["sync_period_s"], {KEDA: r"pollingInterval: (\d+)", RULES: r"longlive-autoscaling\n\s+interval: (\d+)s"}),
    (POLICY["drain"]["grace_period_s"], {f"{KUBERNETES}/base/server.yaml": r"(?:preStop \(|--for=)(\d+)"}),
    (
        POLICY["service"]["max_attempts"],
        {
            "docs/client.md": r"(?:`max_attempts` \| |up to )(\d+)",
            "docs/capacity.md": r"(?:tries up to |max_attempts = )(\d+)",
        },
    ),
    (
        POLICY["service"]["max_chunks_ahead"],
        {
            f"{KUBERNETES}/components/gpu/serve.toml": r"max_chunks_ahead = (\d+)",
            "docs/capacity.md": r"max_chunks_ahead = (\d+)",
        },
    ),
    (POLICY["service"]["max_wait_s"], {f"{KUBERNETES}/components/gpu/serve.toml": r"max_wait_s = ([\d.]+)"}),
    (POLICY["service"]["max_waiting"], {f"{KUBERNETES}/components/gpu/serve.toml": r"max_waiting = (\d+)"}),
    (
        PROJECT["version"],
        {
            "deploy/Dockerfile": IMAGE,
            "deploy/Dockerfile.cpu": IMAGE,
            "deploy/compose.yaml": IMAGE,
            "deploy/compose.gpu.yaml": IMAGE,
            f"{KUBERNETES}/base/server.yaml": IMAGE,
            f"{KUBERNETES}/components/gpu/server.yaml": IMAGE,
            f"{KUBERNETES}/overlays/cpu-demo/kustomization.yaml": IMAGE,
            f"{KUBERNETES}/upload.yaml": IMAGE,
            "docs/deploy.md": IMAGE,
        },
    ),
    (VERSIONS[0], {"deploy/Dockerfile": r"ARG TENSORRT=([\d.]+)"}),
    (
        SERVER.grpc_port,
        {
            "deploy/Dockerfile": r"EXPOSE \d+ (\d+) \d+",
            "deploy/Dockerfile.cpu": r"EXPOSE \d+ (\d+) \d+",
            "deploy/proxy/compose.cfg": r"server:(\d+) ",
            "deploy/proxy/servers.sh": r"DOMAIN:(\d+) ",
            f"{KUBERNETES}/base/server.yaml": r"name: grpc, containerPort: (\d+)",
            f"{KUBERNETES}/base/services.yaml": r"name: grpc, port: (\d+)",
            f"{KUBERNETES}/overlays/gateway/gateway.yaml": r"name: longlive, port: (\d+)",
            "docs/quickstart.md": r"gRPC on port (\d+)",
        },
    ),
    (
        SERVER.http_port,
        {
            "deploy/Dockerfile": r"EXPOSE (\d+)",
            "deploy/Dockerfile.cpu": r"EXPOSE (\d+)",
            "deploy/proxy/compose.cfg": r"check port (\d+)",
            "deploy/proxy/servers.sh": r"check port (\d+)",
            f"{KUBERNETES}/base/server.yaml": r"name: http, containerPort: (\d+)",
            f"{KUBERNETES}/base/services.yaml": r"name: http, port: (\d+)",
            "docs/quickstart.md": r"HTTP on (\d+)",
        },
    ),
    (
        SERVER.metrics_port,
        {
            "deploy/Dockerfile": r"EXPOSE \d+ \d+ (\d+)",
            "deploy/Dockerfile.cpu": r"EXPOSE \d+ \d+ (\d+)",
            "deploy/prometheus/prometheus.yml": r"server\], type: A, port: (\d+)",
            f"{KUBERNETES}/base/server.yaml": r"(?:prometheus.io/port: \"|name: metrics, containerPort: )(\d+)",
            "docs/quickstart.md": r"metrics on (\d+)",
        },
    ),
]


@pytest.mark.parametrize(
    ("source", "path", "pattern"),
    [(source, path, pattern) for source, copies in COPIES for path, pattern in copies.items()],
)
def test_a_copy_is_what_its_source_says(source: object, path: str, pattern: str) -> None:
    copies = re.findall(pattern, (ROOT / path).read_text(encoding="utf-8"))
    assert copies, f"{path}: got no copy of {source}, expected {pattern}"
    if isinstance(source, str):
        assert set(copies) == {source}
    else:
        assert {float(copy) for copy in copies} == {source}


def test_a_drain_asks_at_the_port_of_the_metrics() -> None:
    assert DEFAULT_URL.endswith(f":{SERVER.metrics_port}/metrics")


def test_images_that_several_files_name_have_one_version() -> None:
    paths = [*(ROOT / KUBERNETES).rglob("*.yaml"), *(ROOT / "deploy").glob("compose*.yaml")]
    images = {image for path in paths for image in re.findall(r"image: (\S+?):(\S+)", path.read_text(encoding="utf-8"))}
    versions = [name for name, tag in images if not tag.endswith("-cpu")]
    assert len(versions) == len(set(versions)), sorted(images)
