# SPDX-License-Identifier: Apache-2.0
"""Checks deploy/ without a cluster, Docker or a GPU: `make deploy-check`.

Checks whose command or package is missing are reported as skipped. Exit code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.checks import tools
from deploy.checks.dockerfiles import DOCKERFILES, ROOT, missing_copy_sources
from deploy.checks.manifests import (
    KUBERNETES,
    VERSIONS,
    Document,
    can_validate,
    documents,
    overlays,
    render,
    schema_errors,
)
from deploy.checks.queries import RULES, dashboard_queries
from deploy.checks.references import reference_errors

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
COLORS = {OK: "green", FAILED: "bold red", SKIPPED: "yellow"}
DEPLOY = ROOT / "deploy"
COMPOSE = (DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml")
PROXY = DEPLOY / "proxy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    result: str
    detail: str


def make_check(name: str, errors: Sequence[str], detail: str) -> Check:
    return Check(name=name, result=FAILED if errors else OK, detail="\n".join(errors) or detail)


def skip_check(name: str, why: str) -> Check:
    return Check(name=name, result=SKIPPED, detail=why)


def run(command: Sequence[str], cwd: Path = ROOT, **environment: str) -> list[str]:
    """Run a command. Returns its output as an error if it fails, else nothing."""
    result = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=False)
    output = (result.stdout + result.stderr).strip()
    return [output or f"{command[0]} ended with {result.returncode}"] if result.returncode else []


def manifests() -> Iterator[Check]:
    kustomize = tools.kustomize()
    if kustomize is None:
        yield skip_check("Kubernetes", "neither kubectl nor kustomize is installed")
        return
    for folder in overlays():
        name = f"Kubernetes: {folder.name}"
        try:
            found = render(folder, kustomize)
        except ValueError as error:
            yield make_check(name, [str(error)], "")
            continue
        detail = f"{len(found)} documents, rendered by {Path(kustomize[0]).name}; references resolve"
        yield make_check(name, reference_errors(found), detail)
        yield from schemas(name, found)
    yield from schemas("Kubernetes: upload.yaml", documents((KUBERNETES / "upload.yaml").read_text(encoding="utf-8")))
    rules = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata: {name: longlive}\nspec:\n"
    found = documents("---\n".join(rules + _indented(path.read_text(encoding="utf-8")) for path in RULES))
    yield from schemas("Kubernetes: rules, as docs/deploy.md wraps them", found)


def schemas(name: str, found: Sequence[Document]) -> Iterator[Check]:
    if not can_validate():
        yield skip_check(f"{name}, schemas", "kubernetes-validate is not installed (extra `deploy-check`)")
        return
    errors = [f"{version}: {fault}" for version in VERSIONS for one in found for fault in schema_errors(one, version)]
    yield make_check(
        f"{name}, schemas", errors, f"{len(found)} documents, strictly, as Kubernetes {' and '.join(VERSIONS)}"
    )


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def images() -> Iterator[Check]:
    hadolint = tools.find("hadolint")
    for path in DOCKERFILES:
        yield make_check(path.name, missing_copy_sources(path), "all COPY sources exist and are not ignored")
        if hadolint is None:
            yield skip_check(f"{path.name}, hadolint", "hadolint is not installed (extra `deploy-check`)")
        else:
            yield make_check(f"{path.name}, hadolint", run([hadolint, str(path)]), "no warnings")


def compose() -> Iterator[Check]:
    command = tools.compose()
    if command is None:
        yield skip_check("compose", "docker compose is not installed")
        return
    files = [word for path in COMPOSE for word in ("-f", str(path))]
    yield make_check("compose.yaml", run([*command, *files[:2], "config", "-q"]), "read by docker compose")
    yield make_check("compose.gpu.yaml on top", run([*command, *files, "config", "-q"]), "read by docker compose")


def proxy() -> Iterator[Check]:
    haproxy = tools.find("haproxy")
    if haproxy is None:
        yield skip_check("HAProxy", "haproxy is not installed (Debian, Ubuntu: apt-get install haproxy)")
        return
    check = [haproxy, "-c", "-f", str(PROXY / "haproxy.cfg"), "-f"]
    yield make_check("HAProxy: compose", run([*check, str(PROXY / "compose.cfg")]), "haproxy -c")
    with tempfile.TemporaryDirectory() as folder:
        servers = str(Path(folder, "servers.cfg"))
        setup_errors = run(["sh", str(PROXY / "servers.sh"), servers], SERVERS="1000", NAMESPACE="longlive")
        yield make_check("HAProxy: Kubernetes", setup_errors or run([*check, servers]), "haproxy -c with 1000 servers")


def rules() -> Iterator[Check]:
    promtool = tools.find("promtool")
    if promtool is None:
        yield skip_check("Prometheus", "promtool is not installed")
        return
    cwd = DEPLOY / "prometheus"
    yield make_check(
        "Prometheus: prometheus.yml", run([promtool, "check", "config", "prometheus.yml"], cwd), "promtool"
    )
    files = [path.name for path in RULES]
    yield make_check("Prometheus: rules", run([promtool, "check", "rules", "--lint-fatal", *files], cwd), "promtool")
    yield make_check("Prometheus: tests of the rules", run([promtool, "test", "rules", "tests.yml"], cwd), "promtool")
    queries = list(dashboard_queries())
    with tempfile.TemporaryDirectory() as folder:
        as_rules = "".join(
            f"  - record: query{n}\n    expr: {expression!r}\n" for n, (_, expression) in enumerate(queries)
        )
        Path(folder, "rules.yml").write_text(f"groups:\n- name: dashboard\n  rules:\n{as_rules}", encoding="utf-8")
        errors = run([promtool, "check", "rules", "rules.yml"], Path(folder))
    yield make_check("Grafana: dashboard.json", errors, f"{len(queries)} queries parse (promtool)")


def environment() -> Iterator[Check]:
    from deploy.checks.empty_environment import build_and_serve, temporary_folder

    name = "the image's layout in an empty environment"
    try:
        with temporary_folder() as folder:
            yield make_check(name, [], build_and_serve(folder))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        yield make_check(name, [str(error)], "")


CHECKS: tuple[Callable[[], Iterator[Check]], ...] = (images, compose, proxy, rules, manifests)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.checks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="skip the empty environment, which takes minutes")
    parser.add_argument("--offline", action="store_true", help="do not download missing commands")
    args = parser.parse_args(argv)
    if not args.offline:
        tools.fetch_missing()
    table = Table("checked", "result", "", title="deploy/")
    results = []
    for check in (*CHECKS, *(() if args.quick else (environment,))):
        for one in check():
            results.append(one.result)
            table.add_row(Text(one.name), Text(one.result, COLORS[one.result]), Text(one.detail))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(", ".join(f"{results.count(result)} {result}" for result in (OK, FAILED, SKIPPED)))
    return 1 if FAILED in results else 0


if __name__ == "__main__":
    sys.exit(main())
