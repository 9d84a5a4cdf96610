# SPDX-License-Identifier: Apache-2.0
"""Checks all of deploy/ that can be checked without a cluster, Docker or a GPU: `make deploy-check`.

What needs a command or a package that is not to be had is said to be skipped. Exit code 1: something is wrong.
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
from deploy.checks.images import DOCKERFILES, ROOT, missing_sources
from deploy.checks.loose_ends import loose_ends
from deploy.checks.manifests import (
    KUBERNETES,
    VERSIONS,
    Document,
    can_validate,
    documents,
    overlays,
    render,
    schema_faults,
)
from deploy.checks.queries import RULES, dashboard_queries

OK, FAILED, SKIPPED = "ok", "failed", "skipped"
COLOURS = {OK: "green", FAILED: "bold red", SKIPPED: "yellow"}
DEPLOY = ROOT / "deploy"
COMPOSE = (DEPLOY / "compose.yaml", DEPLOY / "compose.gpu.yaml")
PROXY = DEPLOY / "proxy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was looked at."""

    what: str
    result: str
    detail: str


def row(what: str, wrong: Sequence[str], right: str) -> Row:
    return Row(what=what, result=FAILED if wrong else OK, detail="\n".join(wrong) or right)


def skipped(what: str, why: str) -> Row:
    return Row(what=what, result=SKIPPED, detail=why)


def run(command: Sequence[str], where: Path = ROOT, **environment: str) -> list[str]:
    """What a command has to complain of; nothing when it ends with 0."""
    done = subprocess.run(command, cwd=where, env=os.environ | environment, capture_output=True, text=True, check=False)
    words = (done.stdout + done.stderr).strip()
    return [words or f"{command[0]} ended with {done.returncode}"] if done.returncode else []


def manifests() -> Iterator[Row]:
    kustomize = tools.kustomize()
    if kustomize is None:
        yield skipped("Kubernetes", "neither kubectl nor kustomize is here")
        return
    for folder in overlays():
        what = f"Kubernetes: {folder.name}"
        try:
            found = render(folder, kustomize)
        except ValueError as error:
            yield row(what, [str(error)], "")
            continue
        right = f"{len(found)} documents, rendered by {Path(kustomize[0]).name}; they fit together"
        yield row(what, loose_ends(found), right)
        yield from schemas(what, found)
    yield from schemas("Kubernetes: upload.yaml", documents((KUBERNETES / "upload.yaml").read_text(encoding="utf-8")))
    rules = "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata: {name: longlive}\nspec:\n"
    found = documents("---\n".join(rules + _indented(path.read_text(encoding="utf-8")) for path in RULES))
    yield from schemas("Kubernetes: rules, as docs/deploy.md wraps them", found)


def schemas(what: str, found: Sequence[Document]) -> Iterator[Row]:
    if not can_validate():
        yield skipped(f"{what}, schemas", "kubernetes-validate is not installed (extra `deploy-check`)")
        return
    wrong = [f"{version}: {fault}" for version in VERSIONS for one in found for fault in schema_faults(one, version)]
    yield row(f"{what}, schemas", wrong, f"{len(found)} documents, strictly, as Kubernetes {' and '.join(VERSIONS)}")


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


def images() -> Iterator[Row]:
    hadolint = tools.find("hadolint")
    for path in DOCKERFILES:
        yield row(path.name, missing_sources(path), "what it copies is there, and not ignored")
        if hadolint is None:
            yield skipped(f"{path.name}, hadolint", "hadolint is not here (extra `deploy-check`)")
        else:
            yield row(f"{path.name}, hadolint", run([hadolint, str(path)]), "no complaint")


def compose() -> Iterator[Row]:
    command = tools.compose()
    if command is None:
        yield skipped("compose", "docker compose is not here")
        return
    files = [word for path in COMPOSE for word in ("-f", str(path))]
    yield row("compose.yaml", run([*command, *files[:2], "config", "-q"]), "read by docker compose")
    yield row("compose.gpu.yaml on top", run([*command, *files, "config", "-q"]), "read by docker compose")


def proxy() -> Iterator[Row]:
    haproxy = tools.find("haproxy")
    if haproxy is None:
        yield skipped("HAProxy", "haproxy is not here (Debian, Ubuntu: apt-get install haproxy)")
        return
    check = [haproxy, "-c", "-f", str(PROXY / "haproxy.cfg"), "-f"]
    yield row("HAProxy: compose", run([*check, str(PROXY / "compose.cfg")]), "haproxy -c")
    with tempfile.TemporaryDirectory() as folder:
        servers = str(Path(folder, "servers.cfg"))
        made = run(["sh", str(PROXY / "servers.sh"), servers], SERVERS="1000", NAMESPACE="longlive")
        yield row("HAProxy: Kubernetes", made or run([*check, servers]), "haproxy -c with 1000 servers")


def rules() -> Iterator[Row]:
    promtool = tools.find("promtool")
    if promtool is None:
        yield skipped("Prometheus", "promtool is not here")
        return
    where = DEPLOY / "prometheus"
    yield row("Prometheus: prometheus.yml", run([promtool, "check", "config", "prometheus.yml"], where), "promtool")
    files = [path.name for path in RULES]
    yield row("Prometheus: rules", run([promtool, "check", "rules", "--lint-fatal", *files], where), "promtool")
    yield row("Prometheus: tests of the rules", run([promtool, "test", "rules", "tests.yml"], where), "promtool")
    queries = list(dashboard_queries())
    with tempfile.TemporaryDirectory() as folder:
        as_rules = "".join(
            f"  - record: query{n}\n    expr: {expression!r}\n" for n, (_, expression) in enumerate(queries)
        )
        Path(folder, "rules.yml").write_text(f"groups:\n- name: dashboard\n  rules:\n{as_rules}", encoding="utf-8")
        wrong = run([promtool, "check", "rules", "rules.yml"], Path(folder))
    yield row("Grafana: dashboard.json", wrong, f"{len(queries)} queries parse (promtool)")


def environment() -> Iterator[Row]:
    from deploy.checks.empty_environment import scratch, try_out

    what = "the image's layout in an empty environment"
    try:
        with scratch() as folder:
            yield row(what, [], try_out(folder))
    except (RuntimeError, OSError, subprocess.SubprocessError) as error:
        yield row(what, [str(error)], "")


CHECKS: tuple[Callable[[], Iterator[Row]], ...] = (images, compose, proxy, rules, manifests)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.checks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="without the empty environment, which takes minutes")
    parser.add_argument("--offline", action="store_true", help="fetch no commands that are not here")
    args = parser.parse_args(argv)
    if not args.offline:
        tools.fetch_missing()
    table = Table("checked", "result", "", title="deploy/")
    results = []
    for check in (*CHECKS, *(() if args.quick else (environment,))):
        for one in check():
            results.append(one.result)
            table.add_row(Text(one.what), Text(one.result, COLOURS[one.result]), Text(one.detail))
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(", ".join(f"{results.count(result)} {result}" for result in (OK, FAILED, SKIPPED)))
    return 1 if FAILED in results else 0


if __name__ == "__main__":
    sys.exit(main())
