# SPDX-License-Identifier: Apache-2.0
"""Figures say what they were measured with, and it is noticed when their code has changed since."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks import stale
from benchmarks.results import DIRTY, KEYS, ROOT, UNKNOWN, Measurement, commit, cpu, git, versions


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a file of code, one of figures and a single commit."""
    for name in ("NAME", "EMAIL"):
        for who in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{who}_{name}", "somebody")
    for folder in ("code", "results"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text("1")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def all_headers() -> Iterator[tuple[str, Mapping[str, Any]]]:
    for path in sorted(stale.RESULTS.glob("*.json")):
        found = stale.headers(json.loads(path.read_text(encoding="utf-8")))
        assert found, f"{path.name} does not say how it was made"
        for section, header in found.items():
            yield f"{path.name} {section}", header


def test_every_figure_says_what_it_was_measured_with() -> None:
    for where, header in all_headers():
        assert header.keys() >= {*KEYS}, where
        assert len(header["commit"].removesuffix(DIRTY)) == 40, where
        assert header["code"], where


def test_every_commit_that_a_figure_names_is_in_the_history() -> None:
    """A commit that git does not know here, as in a shallow clone, is what `make stale` says of it."""
    for where, header in all_headers():
        name = header["commit"].removesuffix(DIRTY)
        known = subprocess.run(["git", "-C", str(ROOT), "cat-file", "-e", name], capture_output=True, check=False)
        if known.returncode == 0:
            found = subprocess.run(["git", "-C", str(ROOT), "merge-base", "--is-ancestor", name, "HEAD"], check=False)
            assert found.returncode == 0, f"{where}: {name}"


def test_all_code_that_a_figure_names_exists() -> None:
    if commit() == UNKNOWN:
        pytest.skip("needs a checkout")
    for where, header in all_headers():
        for pattern in header["code"]:
            path = pattern.removeprefix(":!")
            assert (ROOT / path).exists() or [*ROOT.glob(path)], f"{where}: {pattern}"


def test_a_measurement_says_where_it_ran() -> None:
    made = Measurement.begin("stress.soak", ["--config", "my settings.toml"])
    header = made.header(hardware=cpu(), versions=versions("numpy"), code=["client"])
    assert tuple(sorted(header)) == tuple(sorted(KEYS))
    assert header["command"] == "python -m stress.soak --config 'my settings.toml'"
    assert {"python", "numpy"} == header["versions"].keys()


def test_a_commit_is_dirty_when_code_has_changed_and_not_when_figures_have(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout / "results/file").write_text("2")
    assert commit(checkout) == head
    (checkout / "code/file").write_text("2")
    assert commit(checkout) == head + DIRTY


def test_outside_of_a_checkout_the_commit_is_unknown(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert commit(checkout / "code") == UNKNOWN, "a folder of somebody else's repository"
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path_factory.getbasetemp()))
    assert commit(tmp_path_factory.mktemp("bare")) == UNKNOWN
    monkeypatch.setenv("PATH", "")
    assert commit(checkout) == UNKNOWN


def test_figures_are_old_when_their_code_has_changed(checkout: Path) -> None:
    head = commit(checkout)
    assert stale.changed(head, ["code"], checkout) == []
    (checkout / "code/file").write_text("2")
    assert stale.changed(head, ["code"], checkout) == ["code/file"]
    assert stale.changed(head + DIRTY, ["code"], checkout) == ["code/file"]
    assert stale.changed(head, ["code", ":!code/file"], checkout) == []
    git(checkout, "commit", "-q", "-a", "-m", "second")
    assert stale.changed(head, ["code"], checkout) == ["code/file"]
    assert stale.changed(commit(checkout), ["code"], checkout) == []
    for nobody in (UNKNOWN, "0" * 40):
        assert stale.changed(nobody, ["code"], checkout) is None


def test_the_quality_of_the_demo_model_hangs_on_its_measure_world_and_pipeline() -> None:
    if commit() == UNKNOWN:
        pytest.skip("needs a checkout")
    code = json.loads((stale.RESULTS / "quality.json").read_text(encoding="utf-8"))["code"]
    files = git(ROOT, "ls-files", "--", *code).splitlines()
    assert {"training/quality/__main__.py", "training/world.py", "longlive_serve/engine/model_runner.py"} <= {*files}
    assert not [file for file in files if file.startswith(("longlive_serve/doctor/", "training/train_"))]
