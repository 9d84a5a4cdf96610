# SPDX-License-Identifier: Apache-2.0
"""Runs every documented command at its smallest size; `python -m tests.project.smoke` reports the time of each.

A command or documented option without a run fails `test_every_command_is_in_the_table`.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from longlive_client.cli.mp4_writer import VideoFile
from longlive_serve.config.presets import PRESETS
from longlive_serve.triton_server.launcher import TritonServer
from tests.longlive_serve.live.test_live_adapters import TOKEN, write_adapter
from tests.support.cases import write_case
from tests.support.command_table import ELSEWHERE, PROMPT, SKIPPED, SMOKES, Smoke
from tests.support.commands import (
    ROOT,
    Named,
    file_of_test,
    lines_of_code,
    modules,
    named,
    named_in,
    of_make,
    read_arguments,
    verbs,
)
from tests.support.live import start_server

DEMO = ROOT / "model_repository/longlive/1/demo"
LIMIT_S = 900.0  # timeout; cores may be shared


TOOLS_OF_PYTHON = ("-c", "venv", "pip", "pytest")
"""Not run here: CI runs the set-up and the tests."""
NO_SUCH = ("unknown flag", "unknown command", "unknown shorthand", "unknown subcommand", "flag needs an argument")


class Prepared:
    """Lazily created files for commands, for `str.format_map`."""

    def __init__(self, folder: Path, more: dict[str, str]) -> None:
        self._folder, self._more = folder, more | {"root": str(ROOT), "demo": str(DEMO), "token": TOKEN}

    def __getitem__(self, name: str) -> str:
        return self._more[name] if name in self._more else str(getattr(self, name)())

    def out(self) -> Path:
        return self._folder / "out"

    def tiny(self) -> Path:
        return self._written("serve.toml", 'preset = "tiny"\nslots = 2\n')

    def demo_settings(self) -> Path:
        return self._written("demo.toml", f'preset = "demo"\nweights = "{DEMO}"\n')

    def adapter(self) -> Path:
        write_adapter(self._folder / "style.pt", dim=PRESETS["demo"].dit.dim)
        return self._folder / "style.pt"

    def lines(self) -> Path:
        return self._written("prompts.txt", f"{shlex.split(PROMPT)[0]}\n")

    def page(self) -> Path:
        return self._written("capacity.md", (ROOT / "docs/capacity.md").read_text(encoding="utf-8"))

    def video(self) -> Path:
        with VideoFile(self._folder / "video.mp4") as file:
            file.write(np.zeros((9, 64, 64, 3), np.uint8))
        return self._folder / "video.mp4"

    def trained(self) -> Path:
        return Path(shutil.copytree(DEMO, self._folder / "trained"))

    def case(self) -> Path:
        return write_case(self._folder, "dit_tiny_rollout")

    def _written(self, name: str, text: str) -> Path:
        (self._folder / name).write_text(text)
        return self._folder / name


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "files").mkdir()
    write_adapter(folder / "files/style.pt")
    with start_server(folder, adapters_dir="files", admin_token=TOKEN) as running:
        yield running


def environment() -> dict[str, str]:
    """A user's environment: without TRITON_INTERPRET, with this checkout on the path."""
    found = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return found | {"PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize(
    "smoke",
    [pytest.param(one, id=one.command, marks=[pytest.mark.long] if one.long else []) for one in SMOKES],
)
def test_a_command_runs(smoke: Smoke, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    shared = {}
    if smoke.needs_server:
        server: TritonServer = request.getfixturevalue("live")
        shared = {"url": server.grpc_url, "metrics": server.metrics_url}
    if "{case_graphs}" in smoke.command:
        shared["case_graphs"] = str(request.getfixturevalue("case_graphs")(False))
    prepared = Prepared(tmp_path, shared)
    run([word.format_map(prepared) for word in shlex.split(smoke.command)], tmp_path)


def test_graphs_become_engines(tmp_path: Path) -> None:
    """`export.to_tensorrt` gets the output of `export.to_onnx`."""
    config, graphs = Prepared(tmp_path, {})["tiny"], f"{tmp_path}/out/graphs"
    of_text = ["--config", config, "--models", "text_encoder", "--dtype", "bfloat16"]
    run(["export.to_onnx", *of_text, "--out", graphs], tmp_path)
    run(["export.to_tensorrt", graphs, "--library", "tensorrt_rtx", "--out", f"{tmp_path}/out/engines"], tmp_path)


def run(words: list[str], folder: Path) -> None:
    """Run a module in `folder`; its outputs in out/ must exist afterwards."""
    done = subprocess.run(
        [sys.executable, "-m", *words],
        cwd=folder, env=environment(), capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (Path(word) for word in words if word.startswith(f"{folder}/out")):
        assert path.exists(), f"{path} was not written: {done.stdout}{done.stderr}"


def test_a_server_comes_and_goes(tmp_path: Path) -> None:
    config = Prepared(tmp_path, {})["tiny"]
    ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    command = [sys.executable, "-m", "longlive_serve.triton_server", "--config", config, *ports]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready: gRPC 127.0.0.1:")
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0


def test_certificates_are_made(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    command = ["sh", str(ROOT / "deploy/certificates.sh"), "certificates"]
    for _ in range(2):  # the second run renews them
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    verify = ["openssl", "verify", "-CAfile", "ca.crt", "pod/tls.crt", "proxy/tls.crt"]
    subprocess.run(verify, cwd=tmp_path / "certificates", capture_output=True, check=True)


@pytest.mark.parametrize(
    ("line", "module", "options"),
    [
        (
            ".venv/bin/python -m longlive_client.cli.health --url HOST:8001 --ready   # for health",
            "longlive_client.cli.health",
            "--url --ready",
        ),
        (
            "LONGLIVE_ADMIN_TOKEN=... python3 -m longlive_client.cli.set_lora a.pt=0.8",
            "longlive_client.cli.set_lora",
            "",
        ),
        ("~/.pyenv/versions/3.12.1/bin/python3 -m benchmarks.stale", "benchmarks.stale", ""),
        ("python3.12 -m benchmarks.stale", "benchmarks.stale", ""),
        (
            "pip install '.[client]' && python -m longlive_client.cli.generate --url=HOST:8001",
            "longlive_client.cli.generate",
            "--url",
        ),
        ("slots = 2  # python -m longlive_serve.doctor", "", ""),
        ("a server's own python -m words", "", ""),
    ],
)
def test_a_command_in_a_line_is_seen(line: str, module: str, options: str) -> None:
    seen = [one for one in named_in("a page", line, whole=True) if one.module]
    assert [one.module for one in seen] == [module] * bool(module)
    assert {option for one in seen for option in one.options} == {*options.split()}


def test_lines_of_code_are_told_from_prose() -> None:
    page = "Text\n\n    make demo\n    python -m a \\\n        --b c\n\n```\nmake test\n```\nmake no\n"
    assert [*lines_of_code(page)] == ["make demo", "python -m a --b c", "make test"]


def test_an_option_that_a_command_does_not_have_is_noticed() -> None:
    assert read_arguments("longlive_client.cli.health", ["--ready"], whole=True)
    for arguments, whole in ((["--url", "a:1", "--redy-s"], True), (["--out", "x"], True), (["--outt", "x"], False)):
        with pytest.raises(SystemExit):
            read_arguments("export.convert" if "x" in arguments else "longlive_client.cli.health", arguments, whole)
    assert read_arguments("export.convert", ["--out", "x"], whole=False), "a mention may leave out --weights"


@pytest.fixture(scope="module")
def everywhere() -> list[Named]:
    return named()


def in_the_table() -> dict[str, set[str]]:
    """The options of every command that are run, or skipped for a reason."""
    found: dict[str, set[str]] = {}
    for one in SMOKES:
        found.setdefault(one.named.module, set()).update(one.named.options)
    for other in (*ELSEWHERE, *SKIPPED):
        found.setdefault(other.module, set()).update(other.options.split())
    return found


def test_every_command_is_in_the_table(everywhere: list[Named]) -> None:
    table = in_the_table()
    missing = [f"python -m {module}" for module in modules() if module not in table]
    for one in everywhere:
        if one.module and one.module not in TOOLS_OF_PYTHON:
            options = one.options - table.get(one.module, set())
            missing += [f"{one} ({' '.join(sorted(options))})"] if options or one.module not in table else []
    assert not missing, "no smoke test runs these; add one to tests/support/command_table.py:\n" + "\n".join(missing)


def test_the_table_names_what_exists() -> None:
    assert in_the_table().keys() <= {*modules()}
    for other in ELSEWHERE:
        file, _, name = other.test.partition(".")
        assert callable(getattr(importlib.import_module(file_of_test(file)[:-3].replace("/", ".")), name, None)), other


def test_every_command_reads_its_arguments(everywhere: list[Named], capsys: pytest.CaptureFixture[str]) -> None:
    """Including commands that cannot run here: they need a GPU or a cluster."""
    refused = []
    for one in everywhere:
        if one.module and one.module not in TOOLS_OF_PYTHON:
            try:
                read_arguments(one.module, one.arguments, one.whole)
            except SystemExit:
                refused.append(f"{one}\n    {capsys.readouterr().err.splitlines()[-1]}")
    assert not refused, "\n".join(refused)


def test_every_verb_and_every_extra_that_is_named_exists(everywhere: list[Named]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ].keys()
    for one in everywhere:
        if one.words[0] == "make":
            assert {word for word in one.arguments if "=" not in word} <= {*verbs()}, one
        if "pip" in one.words:
            for wanted in re.findall(r"\[(.*)\]", " ".join(one.words)):
                assert {*wanted.split(",")} <= extras, one


def test_every_verb_runs_something_and_says_what_it_is_for() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for verb in set(verbs()) - {"help"}:
        assert of_make(verb), verb
        assert f"make {verb}" in told, verb


@pytest.mark.parametrize("tool", ["docker", "kubectl"])
def test_what_needs_a_daemon_or_a_cluster_has_options_that_exist(
    tool: str, everywhere: list[Named], tmp_path: Path
) -> None:
    """Neither is available: each command must fail with that, or with a missing file of the reader's."""
    # Without this machine's configuration, contexts and cluster.
    nowhere = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "DOCKER_HOST": "unix:///nowhere.sock"}
    for one in everywhere:
        for word in one.words if one.words[0] == tool else ():
            assert not word.startswith("deploy/") or word == "deploy/longlive-proxy" or (ROOT / word).exists(), one
    if shutil.which(tool) is None:
        pytest.skip(f"needs {tool}; the files in its commands exist")
    plugins = subprocess.run([tool, "compose", "version"], env=nowhere, capture_output=True, check=False)
    for one in everywhere:
        if one.words[0] != tool or (one.words[1] == "compose" and plugins.returncode):
            continue
        done = subprocess.run(
            one.words, cwd=ROOT, env=nowhere, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode, f"{one}: succeeded"
        assert not any(text in done.stderr for text in NO_SUCH), f"{one}: {done.stderr}"
