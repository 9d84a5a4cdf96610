# SPDX-License-Identifier: Apache-2.0
"""deploy/: every path, module and command that it names exists; alerts have runbooks; a drain ends.

What takes tools that are not everybody's is in `make deploy-check`.
"""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from deploy import drain
from deploy.checks import tools
from deploy.checks.dockerfiles import DOCKERFILES, ROOT, load_stages, missing_copy_sources
from deploy.checks.manifests import KUBERNETES, documents
from deploy.checks.references import PROBES
from longlive_serve.triton_server.arguments import server_parser
from tests.support.commands import read_arguments, verbs
from tests.support.deployment import (
    ADAPTER,
    DEPLOY,
    GPU_SETTINGS,
    compose_services,
    metrics_in,
    queried_metrics,
    recordings,
    rules,
)

HADOLINT = tools.find("hadolint")
OWN_IMAGE = "longlive-serve"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_the_dockerfiles_copy_is_there(path: Path) -> None:
    assert missing_copy_sources(path) == []


def test_a_copy_of_a_file_that_is_missing_or_ignored_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python AS a\nCOPY nothing .\nFROM python\nCOPY --from=a /x export ./\n")
    (tmp_path / "Dockerfile.dockerignore").write_text("*\n!export\n")
    missing = ["COPY nothing: no such file", "COPY nothing: the .dockerignore hides it"]
    assert missing_copy_sources(tmp_path / "Dockerfile") == missing


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint (extra `dev`)")
def test_hadolint_passes_the_dockerfiles_and_holds_the_rules_that_they_keep(tmp_path: Path) -> None:
    for path in DOCKERFILES:
        subprocess.run([str(HADOLINT), str(path)], check=True)
    (tmp_path / "Dockerfile").write_text("FROM python\nCOPY --from=nowhere a /b\nUSER root\nENTRYPOINT run\n")
    output = subprocess.run([str(HADOLINT), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False)
    for rule in ("DL3006", "DL3022", "DL3002", "DL3025"):  # a version, a stage that exists, not root, no shell
        assert rule in output.stdout


def modules_in(dockerfile: Path) -> set[str]:
    """The folders that `python3 -m` finds in an image: those copied, and the packages in the wheel."""
    copied = {source.partition("/")[0] for copy in load_stages(dockerfile)[-1].copies for source in copy.sources}
    return copied | {"longlive_serve", "longlive_client"}


def check_command(command: list[str], dockerfile: Path) -> None:
    """That a command for our image names what is there, with options that it has."""
    if command[0].endswith(".sh"):
        assert (
            f"COPY deploy/__init__.py deploy/drain.py deploy/{Path(command[0]).name} deploy/"
            in dockerfile.read_text(encoding="utf-8")
        )
        assert os.access(DEPLOY / Path(command[0]).name, os.X_OK), "a hook needs the right to be run"
        return
    assert command[:2] == ["python3", "-m"], command
    module = command[2]
    assert module.partition(".")[0] in modules_in(dockerfile), module
    assert read_arguments(module, command[3:], whole=True), f"{module} takes arguments"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_entry_and_health_check_are_commands_of_ours(path: Path) -> None:
    last = load_stages(path)[-1]
    entry, health = last.last("ENTRYPOINT"), last.last("HEALTHCHECK")
    assert entry is not None
    assert health is not None
    check_command(entry.words, path)
    check_command(yaml.safe_load(health.text.partition("CMD ")[2]), path)
    assert server_parser().parse_args(entry.words[3:]).host == "0.0.0.0"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for stage in load_stages(path):
        assert set(filter(None, stage.arguments().get("EXTRAS", "").split(","))) <= extras.keys()


def test_every_command_in_a_pod_exists() -> None:
    found = [
        one
        for path in KUBERNETES.rglob("*.yaml")
        for one in documents(path.read_text(encoding="utf-8"))
        if "spec" in one
    ]
    pods = [one["spec"] if one["kind"] == "Pod" else one["spec"].get("template", {}).get("spec", {}) for one in found]
    checked = 0
    for container in [c for pod in pods for c in (*pod.get("initContainers", []), *pod.get("containers", []))]:
        if not container.get("image", "").startswith(OWN_IMAGE):
            continue
        hooks = [container[kind] for kind in PROBES if kind in container]
        hooks += container.get("lifecycle", {}).values()
        commands = [hook["exec"]["command"] for hook in hooks]
        commands += [container["command"]] if container.get("command", ["sleep"])[0] != "sleep" else []
        for command in commands:
            check_command(command, DOCKERFILES[0])
            if not command[0].endswith(".sh"):
                check_command(command, DOCKERFILES[1])
        server_parser().parse_args(container.get("args", []))
        checked += len(commands)
    assert checked == 5


def test_every_file_in_compose_exists() -> None:
    for name, service in compose_services().items():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file(), name
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), name
        if "entrypoint" in service:
            check_command(service["entrypoint"], DOCKERFILES[0])
        assert ":" in service["image"], name
    server_parser().parse_args(compose_services()["compose.yaml: server"]["command"])
    for path in (DEPLOY / "grafana/provisioning").rglob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["apiVersion"] == 1


def test_prepare_runs_conversions_that_exist_and_does_nothing_twice(tmp_path: Path) -> None:
    tools_of = tmp_path / "bin"
    tools_of.mkdir()
    (tools_of / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA H200\n")
    (tools_of / "python3").write_text(
        '#!/bin/sh\necho "$@" >> "$LOG"\nwhat=$2 out=\nfor word; do test "$out" = --out && out=$word\n'
        'test "$word" = --out && out=--out\ndone\ncase $what in export.*) mkdir -p "$out" ;; *) echo 10.16 ;; esac\n'
        'test "$what" != export.convert || echo {} > "$out/config.json"\n'
    )
    for tool in tools_of.iterdir():
        tool.chmod(0o755)
    settings = {"CACHE": str(tmp_path / "cache"), "ENGINES": str(tmp_path / "run/engines"), "CONFIG": str(GPU_SETTINGS)}
    environment = settings | {"PATH": f"{tools_of}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")}
    for _ in range(2):
        subprocess.run(["sh", str(DEPLOY / "prepare.sh")], env=environment, check=True)
    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    commands = [line.split()[1:] for line in lines if line.startswith("-m export.")]
    called = [module for module, *_ in commands]
    assert called == ["export.convert", "export.to_onnx", "export.to_tensorrt", "export.convert", "export.to_tensorrt"]
    for module, *arguments in commands:
        assert read_arguments(module, arguments, whole=True), module
    engines = (tmp_path / "run/engines").resolve()
    assert engines.parent == tmp_path / "cache/engines"
    assert engines.name.endswith("-NVIDIA-H200-10.16")


def test_the_page_on_deployment_names_what_exists() -> None:
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    for path in re.findall(r"(?<![\w/.~-])deploy/[\w./-]*\w", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`((?:components|overlays|base)/[\w./-]+)`", text):
        assert (KUBERNETES / name).exists(), name
    for verb in re.findall(r"make ([a-z-]+)", text):
        assert verb in verbs()


@pytest.mark.parametrize(
    ("expression", "metrics"),
    [
        ('sum by (namespace) (rate(a_total{x="b{c}"}[5m])) / (d:e > 0)', {"a_total", "d:e"}),
        ("histogram_quantile(0.95, sum by (le) (rate(a_bucket[1m]))) > 2e3", {"a_bucket"}),
        ("a and on (x) b or vector(0) unless c offset 5m", {"a", "b", "c"}),
    ],
)
def test_the_metrics_of_an_expression_are_found(expression: str, metrics: set[str]) -> None:
    assert metrics_in(expression) == metrics


def test_every_alert_has_its_section_in_the_runbook_and_its_test() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/runbook.md").read_text(encoding="utf-8"), re.MULTILINE)
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert sorted(sections) == sorted(alerts)
    tested = yaml.safe_load((DEPLOY / "prometheus/tests.yml").read_text(encoding="utf-8"))["tests"]
    cases = [case for test in tested for case in test.get("alert_rule_test", [])]
    for name, rule in alerts.items():
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == name}
        assert fires == {True, False}, f"{name} needs a test in which it fires and one in which it does not"


def test_every_recording_is_used() -> None:
    adapter = ADAPTER.read_text(encoding="utf-8")
    queried = queried_metrics().keys()
    assert not [name for name in recordings() if name not in queried and name not in adapter]


@pytest.mark.skipif(tools.find("promtool") is None, reason="needs promtool (`make deploy-check` fetches it)")
def test_promtool_takes_the_rules() -> None:
    promtool = str(tools.find("promtool"))
    where = DEPLOY / "prometheus"
    for command in (["config", "prometheus.yml"], ["rules", "recording.rules.yml", "alerts.rules.yml"]):
        subprocess.run([promtool, "check", *command], cwd=where, check=True, capture_output=True)


def test_a_drain_ends_when_the_last_session_has() -> None:
    left = [1, 0, 0]
    assert drain.drain(lambda: left.pop(0), seconds=60, settle_s=0) == 0
    assert left == [0]


def test_a_drain_ends_when_its_time_is_over_or_the_server_is_gone() -> None:
    assert drain.drain(lambda: 3, seconds=0.1, settle_s=0) == 3
    assert drain.drain(lambda: None, seconds=60, settle_s=60) == 0
