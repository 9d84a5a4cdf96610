# SPDX-License-Identifier: Apache-2.0
"""Generates the settings reference, docs/settings.md, from `ServeConfig`: `python -m tests.support.settings_page`
prints it, `--write` writes the file.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from longlive_serve.config import serve_config
from longlive_serve.config.serve_config import ServeConfig

PAGE = Path(__file__).parents[2] / "docs/settings.md"
HEAD = """# Settings

Every key of serve.toml. Each may be left out; an unknown one is an error. This page is made from
`longlive_serve/config/serve_config.py` by `python -m tests.support.settings_page --write`.

| key | default | meaning |
| --- | --- | --- |
"""


def rows() -> Iterator[str]:
    """A table row for every setting, with its docstring."""
    tree = ast.parse(inspect.getsource(serve_config))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServeConfig")
    for field, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.target.id.islower():
            default = getattr(ServeConfig(), field.target.id)
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            meaning = " ".join(str(text).split()).replace("|", "\\|") or "as the one above it"
            yield f"| `{field.target.id}` | `{_toml(default)}` | {meaning} |"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value == ():
        return "[]"
    return f'"{value}"' if isinstance(value, str) else str(value)


def page() -> str:
    return HEAD + "\n".join(rows()) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.settings_page", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/settings.md")
    if parser.parse_args(argv).write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
