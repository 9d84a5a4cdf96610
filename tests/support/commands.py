# SPDX-License-Identifier: Apache-2.0
"""Collects the documented commands: code blocks and `spans` of pages, examples of `--help`, comments in deploy/, and
the commands of CI and of the Makefile's targets. Used by `test_commands` and `smoke`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")})
COMMENTED = (".sh", ".yaml", ".yml", ".toml", ".cpu", ".proxy", "")  # files in deploy/; the last is Dockerfile's
FOLDERS = ("benchmarks", "client", "deploy", "export", "longlive_serve", "quantization", "stress", "tests", "training")
TOOLS = ("make", "python", "sh", "docker", "kubectl", "kustomize", "openssl", "pip", "cp", "rm", "ruff", "mypy")
_SPAN = re.compile(r"`([^`]+)`")
_PYTHON = re.compile(r"(.*/)?python[0-9.]*$")
_ASSIGNMENT = re.compile(r"[A-Z_]+=.*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Named:
    """A documented command."""

    where: str
    words: tuple[str, ...]
    """Its tool (of TOOLS) and the arguments."""
    whole: bool
    """A complete command; otherwise a mention, which may omit required arguments."""

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}"

    @property
    def module(self) -> str:
        """The module of `python -m`; empty for other commands."""
        return self.words[2] if self.words[:2] == ("python", "-m") else ""

    @property
    def arguments(self) -> tuple[str, ...]:
        return self.words[3:] if self.module else self.words[1:]

    @property
    def options(self) -> set[str]:
        return {word.partition("=")[0] for word in self.arguments if word.startswith("--")}


def file_of_test(name: str) -> str:
    """The path of the test file with this name, relative to the root."""
    (found,) = (ROOT / "tests").rglob(f"{name}.py")
    return str(found.relative_to(ROOT))


def named_in(where: str, line: str, whole: bool) -> Iterator[Named]:
    """The commands of a shell line."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an unbalanced quote: prose
        return
    command: list[str] = []
    for word in (*words, "&&"):
        if word not in ("&&", "|", ";"):
            command.append(word)
            continue
        while command and _ASSIGNMENT.fullmatch(command[0]):
            del command[0]
        if command:
            tool = _PYTHON.sub("python", command[0].removeprefix(".venv/bin/"))
            if tool in TOOLS:
                yield Named(where=where, words=(tool, *command[1:]), whole=whole)
        command = []


def lines_of_code(text: str) -> Iterator[str]:
    """Lines of indented and fenced Markdown blocks; a trailing backslash joins lines."""
    inside, before = False, ""
    for line in text.splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside or line.startswith("    "):
            before += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                yield before
                before = ""


def of_pages() -> Iterator[Named]:
    for page in PAGES:
        where, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
        for line in lines_of_code(text):
            yield from named_in(where, line, whole=True)
        for span in _SPAN.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            yield from named_in(where, span, whole=False)


def of_ci() -> Iterator[Named]:
    for line in (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines():
        yield from named_in(".ci/run", line, whole=True)


def of_deploy() -> Iterator[Named]:
    """Commands in indented comments."""
    for path in sorted((ROOT / "deploy").rglob("*")):
        if path.is_file() and path.suffix in COMMENTED:
            for line in re.findall(r"^# {3,}(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
                yield from named_in(str(path.relative_to(ROOT)), line, whole=True)


def of_help() -> Iterator[Named]:
    for module in modules():
        parser = parser_of(module)
        if parser is None:
            continue
        for line in lines_of_code(re.sub(r"^ {2,}", "    ", parser.epilog or "", flags=re.MULTILINE)):
            yield from named_in(f"{module} --help", line, whole=True)
        helps = [action.help or "" for action in parser._actions]
        for span in _SPAN.findall("\n".join([parser.description or "", *helps])):
            yield from named_in(f"{module} --help", span, whole=False)


def verbs() -> list[str]:
    """The targets of the Makefile."""
    (line,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    return [verb for verb in str(line).split() if verb.islower()]  # without FORCE


def of_make(verb: str) -> list[Named]:
    """The commands of a target, including the set-up."""
    done = subprocess.run(["make", "-n", "-B", verb], cwd=ROOT, capture_output=True, text=True, check=True)
    return [named for line in done.stdout.splitlines() for named in named_in(f"make {verb}", line, whole=True)]


def modules() -> list[str]:
    """All modules that `python -m` can run."""
    found = []
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removeprefix("client.")
        if name.endswith(".__main__"):
            found.append(name.removesuffix(".__main__"))
        elif re.search(r"^if __name__ == \"__main__\":$", path.read_text(encoding="utf-8"), re.MULTILINE):
            found.append(name)
    return found


class _Parsed(Exception):  # noqa: N818  the way out of `main`, not an error
    """Raised after a command has parsed its arguments."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        super().__init__()
        self.parser = parser


def read_arguments(module: str, arguments: Iterable[str], whole: bool) -> argparse.ArgumentParser | None:
    """Let the command parse its arguments and stop; exits with 2 for unknown ones. Returns None without a parser."""
    original = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        if not whole:
            for action in parser._actions:
                action.required = False
            for group in parser._mutually_exclusive_groups:
                group.required = False
        original(parser, *given, **named)
        raise _Parsed(parser)

    package = importlib.util.find_spec(f"{module}.__main__") if _is_package(module) else None
    command = importlib.import_module(f"{module}.__main__" if package else module)
    if not vars(command).keys() & {"argparse", "server_parser", "arguments"}:
        assert not [*arguments], f"{module} takes no arguments"
        return None
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse),
        mock.patch.object(sys, "argv", [module, *arguments]),
    ):
        try:
            command.main()
        except _Parsed as parsed:
            return parsed.parser
    raise AssertionError(f"{module} has not read its arguments")


def parser_of(module: str) -> argparse.ArgumentParser | None:
    return read_arguments(module, [], whole=False)


def _is_package(module: str) -> bool:
    return ROOT.joinpath(*module.split("."), "__main__.py").exists()


def named() -> list[Named]:
    """All documented commands, without duplicates."""
    everywhere = [*of_pages(), *of_ci(), *of_deploy(), *of_help(), *(one for verb in verbs() for one in of_make(verb))]
    return list({(one.words, one.whole): one for one in reversed(everywhere)}.values())[::-1]
