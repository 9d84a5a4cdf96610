# SPDX-License-Identifier: Apache-2.0
"""Names in manifests that nothing goes by, and pods that are less shut in than they should be.

A schema sees the form of a document; this sees whether the documents of an overlay fit each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deploy.checks.manifests import Document, title

SECRETS = ("longlive-tls", "longlive-tokens", "longlive-clients", "longlive-pod-tls", "longlive-proxy-tls")
NOT_SHIPPED = {("Secret", name) for name in SECRETS}  # made by whoever deploys
WORKLOADS = ("StatefulSet", "Deployment", "Job")
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def reference_errors(documents: Sequence[Document]) -> list[str]:
    """What is wrong with the documents of one overlay."""
    names = {(document["kind"], document["metadata"]["name"]) for document in documents} | NOT_SHIPPED
    workloads = [document for document in documents if document["kind"] in WORKLOADS]
    containers = [container for document in workloads for container in _containers(document)]
    ports = {port["name"] for container in containers for port in container.get("ports", [])}
    errors = []
    for document, kind, name in _references(documents):
        if (kind, name) not in names:
            errors.append(f"{title(document)}: {kind} {name!r} is not there")
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
    """What a pod may that it need not, and mounts of volumes that are not there."""
    security = pod.get("securityContext", {})
    if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
        yield "may run as root"
    if security.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "has no seccomp profile"
    if pod.get("automountServiceAccountToken") is not False:
        yield "gets a token of the cluster"
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
            yield f"{name}: has no limit of memory or no requests"
        if ":" not in container["image"] or container["image"].endswith(":latest"):
            yield f"{name}: the image {container['image']} has no version"
        if missing := mounts - volumes:
            yield f"{name}: mounts {sorted(missing)}, which are no volumes"
    if unused := volumes - mounted:
        yield f"nobody mounts {sorted(unused)}"


def _references(documents: Sequence[Document]) -> Iterator[tuple[Document, str, str]]:
    """Every name of another document: who names it, its kind, the name."""
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
    """What has a kind and a name, inside a document, is another one: what is scaled, a Gateway, a policy's target."""
    if isinstance(part, Mapping):
        if "kind" in part and "name" in part:
            yield part["kind"], part["name"]
        part = list(part.values())
    for inner in part if isinstance(part, list) else []:
        yield from _nested_references(inner)


def _selectors(documents: Sequence[Document]) -> Iterator[tuple[Document, Mapping[str, str]]]:
    """Every choice of pods by labels in the namespace itself."""
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            yield document, spec["selector"]
        elif "selector" in spec:
            yield document, spec["selector"]["matchLabels"]
        elif document["kind"] == "ModelPolicy":
            yield document, spec["podSelector"]["matchLabels"]
            peers = [peer for rule in spec.get("ingress", []) for peer in rule.get("from", [])]
            peers += [peer for rule in spec.get("egress", []) for peer in rule.get("to", [])]
            for peer in peers:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    yield document, peer["podSelector"]["matchLabels"]


def _selects(labels: Mapping[str, str], workloads: Sequence[Document]) -> bool:
    return any(labels.items() <= document["spec"]["template"]["metadata"]["labels"].items() for document in workloads)


def _ports(documents: Sequence[Document]) -> Iterator[tuple[Document, str]]:
    """Every port that is named and not numbered."""
    for document in documents:
        spec, named = document.get("spec", {}), []
        if document["kind"] in WORKLOADS:
            probes = [container[probe] for container in _containers(document) for probe in PROBES if probe in container]
            named = [probe["httpGet"]["port"] for probe in probes if "httpGet" in probe]
        elif document["kind"] == "Service":
            named = [port["targetPort"] for port in spec["ports"]]
        elif document["kind"] == "ModelPolicy":
            rules = [*spec.get("ingress", []), *spec.get("egress", [])]
            named = [port["port"] for rule in rules for port in rule.get("ports", [])]
        elif document["kind"] == "PodMonitor":
            named = [endpoint["port"] for endpoint in spec["podMetricsEndpoints"]]
        yield from ((document, port) for port in named if isinstance(port, str))


def _containers(workload: Document) -> list[dict[str, Any]]:
    pod = workload["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]
