# SPDX-License-Identifier: Apache-2.0
"""Rules of the house that a reader relies on."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("client", "deploy", "export", "model_repository", "quantization", "tests", "training")


def imports_of(path: Path) -> set[str]:
    """The top-level packages that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def sources() -> list[Path]:
    skipped = {".venv", "build", "dist"}
    return [path for path in ROOT.rglob("*.py") if not skipped & set(path.relative_to(ROOT).parts)]


def test_the_package_imports_none_of_the_other_folders() -> None:
    for path in (ROOT / "longlive_serve").rglob("*.py"):
        assert not imports_of(path) & set(FOLDERS), path


def test_the_wire_needs_numpy_only() -> None:
    for name in ("protocol", "config"):
        others = imports_of(ROOT / f"longlive_serve/{name}.py") - sys.stdlib_module_names - {"longlive_serve"}
        assert others <= {"numpy"}, name


def test_the_triton_adapter_stays_thin() -> None:
    assert len((ROOT / "model_repository/longlive/1/model.py").read_text(encoding="utf-8").splitlines()) < 80


def test_every_source_file_names_its_licence_and_its_purpose() -> None:
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if not text.strip():
            continue
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert ast.get_docstring(ast.parse(text)), path
