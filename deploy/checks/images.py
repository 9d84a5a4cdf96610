# SPDX-License-Identifier: Apache-2.0
"""Dockerfiles as stages of instructions, and the rules that ours keep.

Called by `deploy.checks` and by tests; `deploy.checks.empty_environment` does what they say, without Docker.
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
        """Of the form with brackets, else as a shell splits them."""
        return json.loads(self.text) if self.text.startswith("[") else shlex.split(self.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Copy:
    sources: Sequence[str]
    target: str
    stage: str
    """Where the sources are; empty: in the checkout."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    base: str
    name: str
    instructions: Sequence[Instruction]

    def last(self, keyword: str) -> Instruction | None:
        return next((one for one in reversed(self.instructions) if one.keyword == keyword), None)

    def all(self, keyword: str) -> list[Instruction]:
        return [one for one in self.instructions if one.keyword == keyword]

    @property
    def copies(self) -> list[Copy]:
        found = []
        for one in self.all("COPY"):
            stage, words = "", one.words
            while words[0].startswith("--"):
                option, _, value = words.pop(0).partition("=")
                stage = value if option == "--from" else stage
            found.append(Copy(sources=words[:-1], target=words[-1], stage=stage))
        return found

    def arguments(self) -> dict[str, str]:
        """The ARGs, with their defaults."""
        pairs = (one.text.partition("=") for one in self.all("ARG"))
        return {name: value for name, _, value in pairs}

    def environment(self) -> dict[str, str]:
        pairs = (word.partition("=") for one in self.all("ENV") for word in one.words)
        return {name: value for name, _, value in pairs}


def stages(path: Path) -> list[Stage]:
    """The stages, with the ARGs before the first of them put in."""
    found: list[tuple[str, str, list[Instruction]]] = []
    defaults: dict[str, str] = {}
    for one in _instructions(path.read_text(encoding="utf-8")):
        if one.keyword == "FROM":
            words = re.sub(r"\$\{(\w+)\}", lambda name: defaults[name[1]], one.text).split()
            found.append((words[0], words[2] if len(words) > 2 else "", []))
        elif found:
            found[-1][2].append(one)
        else:
            name, _, value = one.text.partition("=")
            defaults[name] = value
    return [Stage(base=base, name=name, instructions=inside) for base, name, inside in found]


def faults(path: Path) -> list[str]:
    """Where a Dockerfile does not keep our rules."""
    every = stages(path)
    names, last = {stage.name for stage in every}, every[-1]
    found = [f"{stage.base}: no version" for stage in every if stage.base not in names and not _pinned(stage.base)]
    found += ["ADD: expected COPY" for stage in every for _ in stage.all("ADD")]
    for stage in every:
        for copy in stage.copies:
            if copy.stage and copy.stage not in names:
                found.append(f"COPY --from={copy.stage}: no such stage")
            for source in copy.sources if not copy.stage else ():
                found += [f"COPY {source}: {why}" for why in _unseen(path, source)]
    user = last.last("USER")
    if user is None or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text):
        found.append("USER: expected numbers, and not 0")
    for keyword in ("ENTRYPOINT", "HEALTHCHECK"):
        one = last.last(keyword)
        if one is None or not one.text.partition("CMD ")[2 if keyword == "HEALTHCHECK" else 0].startswith("["):
            found.append(f"{keyword}: expected one, in brackets, so that no shell stands between")
    if last.last("STOPSIGNAL") is None:
        found.append("STOPSIGNAL: expected one")
    return found


def _pinned(base: str) -> bool:
    return "@sha256:" in base or (":" in base.rpartition("/")[2] and not base.endswith(":latest"))


def _unseen(path: Path, source: str) -> Iterator[str]:
    """Why a build would not see a file of the checkout."""
    if not (ROOT / source).exists():
        yield "no such file"
    lines = path.with_name(f"{path.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in lines if line.startswith("!")]
    if not any(source == one or source.startswith(f"{one}/") for one in allowed):
        yield "the .dockerignore hides it"


def _instructions(text: str) -> Iterator[Instruction]:
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip():
            keyword, _, rest = line.strip().partition(" ")
            yield Instruction(keyword=keyword.upper(), text=rest.strip())
