# SPDX-License-Identifier: Apache-2.0
"""The PromQL of rules and dashboards: where it stands, and which metrics it asks for. It parses no PromQL itself."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parents[1]
RULES = (HERE / "prometheus/recording.rules.yml", HERE / "prometheus/alerts.rules.yml")
DASHBOARD = HERE / "grafana/dashboard.json"
DCGM_COUNTERS = HERE / "prometheus/dcgm-counters.csv"

_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h"}  # others are values of labels
_CLAUSES = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_WORDS = {"by", "without", "on", "ignoring", "and", "or", "unless", "bool", "offset", "inf", "nan"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """An expression, and where it stands."""

    where: str
    expression: str

    @property
    def metrics(self) -> set[str]:
        return metrics_in(self.expression)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule of a rules file: one of `record` and `alert` is its name, the other is empty."""

    record: str = ""
    alert: str = ""
    query: Query
    runbook_url: str = ""
    severity: str = ""


def rules() -> list[Rule]:
    return [
        Rule(
            record=rule.get("record", ""),
            alert=rule.get("alert", ""),
            query=Query(where=rule.get("record") or rule["alert"], expression=rule["expr"]),
            runbook_url=rule.get("annotations", {}).get("runbook_url", ""),
            severity=rule.get("labels", {}).get("severity", ""),
        )
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]


def dashboard_queries(path: Path = DASHBOARD) -> Iterator[Query]:
    """Of the panels, the annotations and the variables, with the dashboard's variables put in."""
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield Query(where=f"panel {panel['title']!r}", expression=_without_variables(target["expr"]))
    for annotation in dashboard["annotations"]["list"]:
        yield Query(where=f"annotation {annotation['name']!r}", expression=_without_variables(annotation["expr"]))
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            labels = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            assert labels, f"variable {variable['name']}: got {variable['query']['query']}, expected label_values(...)"
            yield Query(where=f"variable {variable['name']!r}", expression=_without_variables(labels[1]))


def metrics_in(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"', '""', expression)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", " ", bare)
    bare = _CLAUSES.sub(" ", bare)
    names = re.findall(r"(?<![\w:.])[A-Za-z_:][\w:]*(?!\s*\()(?![\w:])", bare)
    return {name for name in names if name.lower() not in _WORDS}


def dcgm_counters() -> set[str]:
    """What NVIDIA's exporter is told to export."""
    lines = DCGM_COUNTERS.read_text(encoding="utf-8").splitlines()
    return {line.partition(",")[0] for line in lines if line and not line.startswith("#")}


def _without_variables(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\{?\w+\}?", "x", expression)
