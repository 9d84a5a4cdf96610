# SPDX-License-Identifier: Apache-2.0
"""The layout of the code: rooms (folders of Python modules), their floors (layers) and the imports between them.

`python -m tests.support.rooms` prints them; `--json FILE` writes size statistics.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.results import Measurement, read_results, versions

ROOT = Path(__file__).parents[2]
FLOORS: Mapping[str, int] = {
    "longlive_serve": 0,  # its name and version
    "longlive_serve.config": 1,
    "longlive_serve.protocol": 1,
    "longlive_serve.observability": 1,
    "longlive_serve.kernels": 1,
    "longlive_serve.models": 2,
    "longlive_serve.triton_server": 2,
    "longlive_serve.weights": 3,
    "longlive_serve.backends": 4,
    "longlive_serve.engine": 5,
    "longlive_serve.doctor": 5,
    "longlive_serve.replay": 6,
    "client": 3,
    "benchmarks": 7,
    "export": 7,
    "model_repository": 7,
    "deploy": 8,
    "stress": 8,
    "training": 8,
    "quantization": 9,
    "tests": 10,
}
"""A room may only import rooms of lower floors. Each folder of longlive_serve is a room, and each other top folder."""
SKIPPED = {".venv", "build", "dist", "wheelhouse"}


def sources() -> list[Path]:
    return [path for path in ROOT.rglob("*.py") if not SKIPPED & set(path.relative_to(ROOT).parts)]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports() -> dict[str, set[str]]:
    """The project's modules that each module imports, also inside functions."""
    modules = {module_of(path) for path in sources()}
    return {module_of(path): _imports_of(path, modules) for path in sources()}


def _imports_of(path: Path, modules: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
            found.add(node.module or "")
    return {own for name in found if (own := _in_the_house(name)) in modules and own != module_of(path)}


def _in_the_house(name: str) -> str:
    return f"client.{name}" if name.split(".", maxsplit=1)[0] == "longlive_client" else name


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "longlive_serve" else parts[0]


def floor_of(module: str) -> int:
    return FLOORS[room_of(module)]


def entries() -> dict[str, set[str]]:
    """The modules and subfolders of every folder of Python modules."""
    found: dict[str, set[str]] = {}
    for path in sources():
        parts = path.relative_to(ROOT).parts
        if parts[-1] != "__init__.py":
            found.setdefault("/".join(parts[:-1]), set()).add(parts[-1])
        for depth in range(1, len(parts) - 1):
            found.setdefault("/".join(parts[:depth]), set()).add(parts[depth])
    found.pop("", None)
    return found


def arrows() -> set[tuple[str, str]]:
    """The imports between rooms, as (importer, imported)."""
    return {
        (room_of(module), room_of(other))
        for module, others in imports().items()
        for other in others
        if room_of(module) != room_of(other)
    }


def circles() -> list[str]:
    """Rooms in import cycles."""
    after: dict[str, set[str]] = {}
    for one, other in arrows():
        after.setdefault(one, set()).add(other)

    def reached(room: str) -> set[str]:
        found: set[str] = set()
        open_ = [room]
        while open_:
            new = after.get(open_.pop(), set()) - found
            found |= new
            open_ += new
        return found

    return sorted(room for room in after if room in reached(room))


def uncommon_words_share(words: Path) -> float:
    """Share of the parts of names in the server and the client that the file `words` does not have, weighted by use.

    Parts are split at underscores and capitals and have three letters or more. Names are those of functions, classes,
    arguments, assigned variables and attributes.
    """
    common = set(words.read_text(encoding="utf-8").split())
    counts: Counter[str] = Counter()
    for path in (path for path in sources() if path.relative_to(ROOT).parts[0] in ("longlive_serve", "client")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = _name_of(node)
            counts.update(part.lower() for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name) if len(part) > 2)
    return round(sum(count for word, count in counts.items() if word not in common) / counts.total(), 4)


def _name_of(node: ast.AST) -> str:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.arg(arg=name) | ast.Attribute(attr=name, ctx=ast.Store()) | ast.Name(id=name, ctx=ast.Store()):
            return name
    return ""


def figures() -> dict[str, float]:
    upward = [(one, other) for one, other in arrows() if FLOORS[other] >= FLOORS[one]]
    own = [path for path in sources() if path.relative_to(ROOT).parts[0] != "tests"]
    return {
        "max_entries": max(len(names) for names in entries().values()),
        "upward_imports": len(upward),
        "circles": len(circles()),
        "rooms": len({room_of(module) for module in imports()}),
        "floors": len(set(FLOORS.values())),
        "arrows": len(arrows()),
        "lines": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in own),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.rooms", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the results to this file; other keys in it stay")
    text = "also count the words in names that are not in this list of words that the field uses"
    parser.add_argument("--words", type=Path, metavar="FILE", help=text)
    arguments = parser.parse_args(argv)
    measurement, found = Measurement.begin("tests.support.rooms", argv), figures()
    for folder, names in sorted(entries().items()):
        print(f"{len(names):3} {folder}: {', '.join(sorted(names))}")
    for one, floor in sorted(FLOORS.items(), key=lambda room: room[1]):
        print(f"{floor:3} {one} -> {', '.join(sorted(other for source, other in arrows() if source == one))}")
    if arguments.words is not None:
        found["uncommon_words_share"] = uncommon_words_share(arguments.words)
    print(found)
    if arguments.json is not None:
        code = [*{room.split(".")[0] for room in FLOORS}]
        measurement.write(arguments.json, {**read_results(arguments.json), **found}, code=code, versions=versions())
    return 0


if __name__ == "__main__":
    sys.exit(main())
