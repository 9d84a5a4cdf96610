# SPDX-License-Identifier: Apache-2.0
"""Parses Dockerfiles into stages of instructions, and checks that their COPY sources are in the checkout.

Called by `deploy.checks` and by tests; `deploy.checks.empty_environment` executes them without Docker.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILES = (ROOT / "deploy/Dockerfile", ROOT / "deploy/Dockerfile.cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    keyword: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the exec form, else split like a shell."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    sources: Sequence[str]
    target: str
    stage: str
    """The stage with the sources; empty: the checkout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    instructions: Sequence[Instruction]

    def last(self, keyword: str) -> Instruction | None:
        return next((one for one in reversed(self.instructions) if one.keyword == keyword), None)

    def all(self, keyword: str) -> list[Instruction]:
        return [one for one in self.instructions if one.keyword == keyword]

    @property
    def copies(self) -> list[Copy]:
        copies = []
        for one in self.all("COPY"):
            options = {word.partition("=")[0]: word.partition("=")[2] for word in one.words if word.startswith("--")}
            *sources, target = (word for word in one.words if not word.startswith("--"))
            copies.append(Copy(sources=sources, target=target, stage=options.get("--from", "")))
        return copies

    def arguments(self) -> dict[str, str]:
        """The ARGs with their defaults."""
        pairs = (one.text.partition("=") for one in self.all("ARG"))
        return {name: value for name, _, value in pairs}

    def environment(self) -> dict[str, str]:
        pairs = (word.partition("=") for one in self.all("ENV") for word in one.words)
        return {name: value for name, _, value in pairs}


def load_stages(path: Path) -> list[Stage]:
    """The stages of a Dockerfile, one per FROM."""
    stages: list[list[Instruction]] = []
    for one in _instructions(path.read_text(encoding="utf-8")):
        if one.keyword == "FROM":
            stages.append([])
        elif stages:
            stages[-1].append(one)
    return [Stage(instructions=instructions) for instructions in stages]


def missing_copy_sources(path: Path) -> list[str]:
    """COPY sources that a build would not find. hadolint does not check this: it does not read the checkout."""
    lines = path.with_name(f"{path.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    errors = []
    for source in (
        source for stage in load_stages(path) for copy in stage.copies if not copy.stage for source in copy.sources
    ):
        if not (ROOT / source).exists():
            errors.append(f"COPY {source}: no such file")
        if not any(source == one or source.startswith(f"{one}/") for one in allowed):
            errors.append(f"COPY {source}: the .dockerignore hides it")
    return errors


def _instructions(text: str) -> Iterator[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield Instruction(keyword=keyword.upper(), text=rest.strip())
