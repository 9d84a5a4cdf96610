# SPDX-License-Identifier: Apache-2.0
"""Renders the Kubernetes manifests with Kustomize and validates them against the schemas of Kubernetes.

Called by `deploy.checks` and by tests. `reference_errors` checks references between documents.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

HERE = Path(__file__).parents[1]
KUBERNETES = HERE / "kubernetes"
SCHEMAS = HERE / "schemas"  # of custom resources
VERSIONS = ("1.32", "1.37")


def overlays() -> list[Path]:
    return sorted(path.parent for path in (KUBERNETES / "overlays").glob("*/kustomization.yaml"))


def render(folder: Path, kustomize: Sequence[str]) -> list[Document]:
    """`kustomize`: the command that renders a folder. Raises ValueError with its stderr."""
    result = subprocess.run([*kustomize, str(folder)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise ValueError(f"{folder}: {result.stderr.strip()}")
    return documents(result.stdout)


def documents(text: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(text) if document]


def title(document: Document) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def can_validate() -> bool:
    return importlib.util.find_spec("kubernetes_validate") is not None


def schema_errors(document: Document, version: str) -> list[str]:
    """Errors and unknown fields for Kubernetes `version`; custom resources are checked against SCHEMAS.

    Needs the package kubernetes-validate.
    """
    import jsonschema
    import kubernetes_validate

    schema = SCHEMAS / f"{document['kind'].lower()}.json"
    try:
        if schema.exists():
            jsonschema.Draft202012Validator(json.loads(schema.read_text(encoding="utf-8"))).validate(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.SchemaNotFoundError as error:
        return [f"{title(document)}: {error.message}; expected a schema in {SCHEMAS}"]
    except jsonschema.ValidationError as error:
        path = ".".join(map(str, error.absolute_path))
        return [f"{title(document)}: {path}: {error.message[:200]}"]
    return []
