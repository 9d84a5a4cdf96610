# SPDX-License-Identifier: Apache-2.0
"""Finds dangling references in manifests, and pods with missing security settings.

Schemas validate single documents; this checks the documents of an overlay against each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploy.checks.manifests import Document, title

SECRETS = ("longlive-tls", "longlive-tokens", "longlive-clients", "longlive-pod-tls", "longlive-proxy-tls")
NOT_SHIPPED = {("Secret", name) for name in SECRETS}  # created at deployment
WORKLOADS = ("StatefulSet", "Deployment", "Job")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def reference_errors(documents: Sequence[Document]) -> list[str]:
    """All errors in the documents of one overlay."""
    names = {(document["kind"], document["metadata"]["name"]) for document in documents} | NOT_SHIPPED
    workloads = [document for document in documents if document["kind"] in WORKLOADS]
    containers = [container for document in workloads for container in _containers(document)]
    ports = {port["name"] for container in containers for port in container.get("ports", [])}
    errors = []
    for document, kind, name in _references(documents):
        if (kind, name) not in names:
            errors.append(f"{title(document)}: {kind} {name!r} does not exist")
    for document, labels in _selectors(documents):
        if not _selects(labels, workloads):
            errors.append(f"{title(document)}: selects no pod: {labels}")
    for document, port in _ports(documents):
        if port not in ports:
            errors.append(f"{title(document)}: no container has the port {port!r}")
    for workload in workloads:
        errors += [f"{title(workload)}: {fault}" for fault in pod_security_errors(workload["spec"]["template"]["spec"])]
    return errors


def pod_security_errors(pod: Mapping[str, Any]) -> Iterator[str]:
    """Unneeded privileges of a pod, missing limits, and mounts without a volume."""
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "mounts a service account token"
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    mounted = set()
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        name, security = container["name"], container.get("securityContext", {})
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        mounted |= mounts
        if security.get("allowPrivilegeEscalation") is not False or security.get("capabilities", {}).get("drop") != [
            "ALL"
        ]:
            yield f"{name}: keeps privileges"
        if security.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: may write to its root"
        if "memory" not in container.get("resources", {}).get("limits", {}) or "requests" not in container["resources"]:
            yield f"{name}: has no memory limit or no requests"
        if ":" not in container["image"] or container["image"].endswith(":latest"):
            yield f"{name}: the image {container['image']} has no version"
        if missing := mounts - volumes:
            yield f"{name}: mounts {sorted(missing)}, which are not volumes of the pod"
    if unused := volumes - mounted:
        yield f"unused volumes: {sorted(unused)}"


def _references(documents: Sequence[Document]) -> Iterator[tuple[Document, str, str]]:
    """All references: the referring document, the kind and the name."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in WORKLOADS:
            pod = spec["template"]["spec"]
            yield document, "ServiceAccount", pod["serviceAccountName"]
            yield document, "PriorityClass", pod["priorityClassName"]
            for volume in pod.get("volumes", []):
                for key, kind, name in (
                    ("configMap", "ConfigMap", "name"),
                    ("secret", "Secret", "secretName"),
                    ("persistentVolumeClaim", "PersistentVolumeClaim", "claimName"),
                ):
                    if key in volume:
                        yield document, kind, volume[key][name]
        if document["kind"] == "StatefulSet":
            yield document, "Service", spec["serviceName"]
        yield from ((document, kind, name) for kind, name in _nested_references(spec))


def _nested_references(part: Any) -> Iterator[tuple[str, str]]:
    """An object with kind and name inside a document is a reference: a scale target, a Gateway, a policy's target."""
    if isinstance(part, Mapping):
        if "kind" in part and "name" in part:
            yield part["kind"], part["name"]
        part = list(part.values())
    for inner in part if isinstance(part, list) else []:
        yield from _nested_references(inner)


def _selectors(documents: Sequence[Document]) -> Iterator[tuple[Document, Mapping[str, str]]]:
    """All label selectors for pods of the same namespace."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            yield document, spec["selector"]
        elif "selector" in spec:
            yield document, spec["selector"]["matchLabels"]
        elif document["kind"] == "NetworkPolicy":
            yield document, spec["podSelector"]["matchLabels"]
            peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
            peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
            for peer in peers:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield document, peer["podSelector"]["matchLabels"]


def _selects(labels: Mapping[str, str], workloads: Sequence[Document]) -> bool:
    return any(labels.items() <= document["spec"]["template"]["metadata"]["labels"].items() for document in workloads)


def _ports(documents: Sequence[Document]) -> Iterator[tuple[Document, str]]:
    """All references to ports by name."""
    for document in documents:
        spec, named = document.get("spec", {}), []
        if document["kind"] in WORKLOADS:
            probes = [container[probe] for container in _containers(document) for probe in PROBES if probe in container]
            named = [probe["httpGet"]["port"] for probe in probes if "httpGet" in probe]
        elif document["kind"] == "Service":
            named = [port["targetPort"] for port in spec["ports"]]
        elif document["kind"] == "NetworkPolicy":
            rules = [*spec.get("ingress", []), *spec.get("egress", [])]
            named = [port["port"] for rule in rules for port in rule.get("ports", [])]
        elif document["kind"] == "PodMonitor":
            named = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        yield from ((document, port) for port in named if isinstance(port, str))


def _containers(workload: Document) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]
