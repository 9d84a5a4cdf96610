# SPDX-License-Identifier: Apache-2.0
"""The output folder of `convert`: checks before writing, detection of existing results, and its config.json.

Called by `convert`. It reads no tensors.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longlive_serve.config.presets import DIT
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.weights.checkpoint import MADE_OF
from longlive_serve.weights.layouts import CONVERTED_FILE, CONVERTED_TOKENIZER_FOLDER
from longlive_serve.weights.tensor_files import metadata, sha256

RECORD = "config.json"
MADE_BY = "longlive-serve export.convert"
FORMAT = 1
PACKAGES = ("torch", "safetensors", "longlive-serve")


def check_folder(config: ServeConfig, out: Path, size: int) -> None:
    """Raises ValueError if `size` bytes cannot be written to `out`, or if it belongs to something else."""
    if out.resolve() == Path(config.weights).resolve():
        raise ValueError(f"out: got {out}, the source folder; expected another one")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}, a file; expected a folder")
    record = out / RECORD
    if record.exists():
        try:
            ours = json.loads(record.read_text(encoding="utf-8")).get("made_by") == MADE_BY
        except (ValueError, AttributeError):
            ours = False
        if not ours:
            raise ValueError(f"{record}: got a file not written by {MADE_BY}, expected none. Choose another --out")
    above = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    there = sum(path.stat().st_size for path in out.glob("*.safetensors*"))
    if (free := shutil.disk_usage(above).free + there) < size:
        raise ValueError(f"{out}: got {free / 1e9:.1f} GB of free space, expected {size / 1e9:.1f} GB")


def is_there(target: Path, made_of: dict[str, Any]) -> bool:
    """Whether `target` exists and was made from `made_of`. Raises ValueError if it is another file."""
    if not target.exists():
        return False
    try:
        before = json.loads(metadata(target).get(MADE_OF, "null"))
    except ValueError:
        before = None
    if before == made_of:
        return True
    what = "made from other files or with other settings" if before else f"not written by {MADE_BY}"
    raise ValueError(f"{target}: got a file {what}, expected none. Choose another --out, or remove it")


def is_copied(source: Path, target: Path) -> bool:
    """Whether `target` exists and is a copy of the folder `source`. Raises ValueError if it is another folder."""
    if not target.exists():
        return False
    if _contents(source) != _contents(target):
        raise ValueError(f"{target}: got other files than in {source}. Choose another --out, or remove it")
    return True


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder atomically."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    os.replace(partial, target)


def write_record(config: ServeConfig, out: Path, made: dict[str, dict[str, Any]]) -> None:
    """Write config.json. `made`: the origin of every file."""
    dit = made[CONVERTED_FILE.format(DIT)]
    record = {
        "made_by": MADE_BY,
        "format": FORMAT,
        "preset": config.preset,
        "sizes": dataclasses.asdict(config.model_config),
        "dtype": dit["dtype"],
        "files": {name: {"bytes": (out / name).stat().st_size, "sources": made[name]["sources"]} for name in made},
        "tokenizer": _contents(out / CONVERTED_TOKENIZER_FOLDER),
        "lora": dit["lora"],
        "use_ema": dit["use_ema"],
        "versions": {package: version(package) for package in PACKAGES} | {"python": platform.python_version()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    partial = out / f"{RECORD}.partial"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out / RECORD)


def _contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
