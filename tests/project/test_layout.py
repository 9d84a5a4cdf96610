# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a reader relies on: which room may import which, and how many doors a room has."""

from __future__ import annotations

import ast
import sys

from tests.support.rooms import ROOT, entries, floor_of, imports, room_of, sources

MOST_ENTRIES = 12


def test_imports_point_to_lower_floors() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room_of(other) != room_of(module) and floor_of(other) >= floor_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_has_more_doors_than_a_reader_can_look_behind() -> None:
    full = {folder: len(names) for folder, names in entries().items() if len(names) > MOST_ENTRIES}
    assert full == {}


def test_the_wire_and_the_settings_need_numpy_only() -> None:
    for room in ("protocol", "config"):
        for path in (ROOT / "longlive_serve" / room).glob("*.py"):
            names = {node.split(".")[0] for node in _imported(path.read_text(encoding="utf-8"))}
            assert names - sys.stdlib_module_names <= {"numpy", "longlive_serve"}, path


def test_every_source_file_names_its_licence_and_its_purpose() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            continue
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), path


def _imported(text: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found
