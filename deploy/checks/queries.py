# SPDX-License-Identifier: Apache-2.0
"""Extracts the dashboard's PromQL for promtool. Called by `deploy.checks` and by tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
RULES = (HERE / "prometheus/recording.rules.yml", HERE / "prometheus/alerts.rules.yml")
DASHBOARD = HERE / "grafana/dashboard.json"

_VARIABLES = {"$__rate_interval": "1m", "$__range": "1h"}  # others are label values


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """Names and expressions of panels, annotations and variables, with dashboard variables substituted."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"panel {panel['title']!r}", _substitute(target["expr"])
    for annotation in dashboard["annotations"]["list"]:
        yield f"annotation {annotation['name']!r}", _substitute(annotation["expr"])
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            labels = re.fullmatch(r"label_values\((.+), \w+\)", variable["query"]["query"])
            assert labels, f"variable {variable['name']}: got {variable['query']['query']}, expected label_values(...)"
            yield f"variable {variable['name']!r}", _substitute(labels[1])


def _substitute(expression: str) -> str:
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\{?\w+\}?", "x", expression)
