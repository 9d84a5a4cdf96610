# SPDX-License-Identifier: Apache-2.0
"""What the tests of deploy/ share: manifests as they are written, compose files, queries."""

from __future__ import annotations

from typing import Any

import yaml

from deploy.checks.images import ROOT
from deploy.checks.manifests import KUBERNETES, Document, documents
from deploy.checks.queries import dashboard_queries, rules

DEPLOY = ROOT / "deploy"
PROXY = DEPLOY / "proxy"
GPU_SETTINGS = KUBERNETES / "components/gpu/serve.toml"
DEMO_SETTINGS = KUBERNETES / "overlays/cpu-demo/serve.toml"
ADAPTER = KUBERNETES / "overlays/autoscaled/prometheus-adapter.yaml"


def manifests(*paths: str) -> list[Document]:
    """The documents of files as they stand, not rendered."""
    return [document for path in paths for document in documents((KUBERNETES / path).read_text(encoding="utf-8"))]


def the(kind: str, found: list[Document], name: str = "longlive") -> Document:
    (one,) = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return one


def compose_services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = {}
    for name in ("compose.yaml", "compose.gpu.yaml"):
        for service, settings in yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))["services"].items():
            services[f"{name}: {service}"] = settings
    return services


def asked_for() -> dict[str, str]:
    """Every metric that rules and dashboard ask for, and where."""
    queries = [*(rule.query for rule in rules()), *dashboard_queries()]
    return {metric: query.where for query in queries for metric in query.metrics}
