# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of deploy/: manifests, compose files, queries."""

from __future__ import annotations

import re
from typing import Any

import yaml

from deploy.checks.dockerfiles import ROOT
from deploy.checks.manifests import KUBERNETES, Document, documents
from deploy.checks.queries import RULES, dashboard_queries

KEYWORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset", "inf", "nan"}
DEPLOY = ROOT / "deploy"
PROXY = DEPLOY / "proxy"
GPU_SETTINGS = KUBERNETES / "components/gpu/serve.toml"
DEMO_SETTINGS = KUBERNETES / "overlays/cpu-demo/serve.toml"
ADAPTER = KUBERNETES / "overlays/autoscaled/prometheus-adapter.yaml"


def manifests(*paths: str) -> list[Document]:
    """The documents of files, not rendered."""
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


def rules() -> list[dict[str, Any]]:
    """All rules for Prometheus."""
    groups = [group for path in RULES for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]]
    return [rule for group in groups for rule in group["rules"]]


def recordings() -> dict[str, str]:
    return {rule["record"]: rule["expr"] for rule in rules() if "record" in rule}


def metrics_in(expression: str) -> set[str]:
    """The metrics of a PromQL expression."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = re.sub(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    names = re.findall(r"(?<![\w:.])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])", bare)
    return {name for name in names if name.lower() not in KEYWORDS}


def queried_metrics() -> dict[str, str]:
    """Every metric in the rules and the dashboard, with the name of a query that uses it."""
    queries = [*((rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()), *dashboard_queries()]
    return {metric: name for name, expression in queries for metric in metrics_in(expression)}


def dcgm_counters() -> set[str]:
    """The counters of NVIDIA's exporter."""
    lines = (DEPLOY / "prometheus/dcgm-counters.csv").read_text(encoding="utf-8").splitlines()
    return {line.partition(",")[0] for line in lines if line and not line.startswith("#")}
