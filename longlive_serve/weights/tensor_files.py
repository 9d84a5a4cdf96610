# SPDX-License-Identifier: Apache-2.0
"""Memory-maps files of tensors (torch, safetensors, sharded safetensors), and explains why a file cannot be read.

Called by `checkpoint` and `lora`. Only plain tensors are unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

INDEX = ".index.json"  # suffix of the file that maps tensors to shards
PIECE = 512 * 1024 * 1024  # bytes
MOST_LISTED = 20  # problems in one message


def read_tensors(path: Path, keys: Sequence[str] = (), required: bool = False) -> dict[str, Tensor]:
    """All tensors of a file, or of all shards of an index, memory-mapped and not read yet.

    A torch file may hold several dicts of tensors: the first of `keys` that exists is returned, else (unless
    `required`) the top-level dict. Raises ValueError that names the file, the problem and the remedy.
    """
    if path.name.endswith(INDEX):
        return _read_shards(path)
    state = _open(path)
    names = list(state) if isinstance(state, Mapping) else [type(state).__name__]
    key = next((key for key in keys if isinstance(state, Mapping) and isinstance(state.get(key), Mapping)), None)
    if key is not None:
        state = state[key]
    elif required:
        raise ValueError(f"{path}: got {listed(names)}, expected the key {' or '.join(keys)}")
    if not isinstance(state, Mapping) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        expected = "".join(f"the key {key}, or " for key in keys)
        raise ValueError(f"{path}: got {listed(names)}, expected {expected}only tensors by name")
    return {str(name): tensor for name, tensor in state.items()}


def files_of(path: Path) -> list[Path]:
    """The files that hold the tensors: `path` itself, or the shards of the index `path`. Raises ValueError."""
    return [path] if not path.name.endswith(INDEX) else sorted({path.parent / name for name in _index(path).values()})


def is_mapped(path: Path) -> bool:
    """Whether `read_tensors` maps the file; the format of torch before 1.6 (2020) must be read as a whole."""
    return all(part.suffix == ".safetensors" or zipfile.is_zipfile(part) for part in files_of(path))


def streamed(read: Callable[[], dict[str, Tensor]], mapped: bool) -> Iterator[tuple[str, Tensor]]:
    """Yields each tensor of `read()`; the caller must not keep references to them.

    The pages read from a mapped file count as memory of this process until the file is closed, so `read` is called
    again after every 512 MiB.
    """
    state, seen = read(), 0
    for name in list(state):
        if mapped and seen > PIECE:
            state, seen = {}, 0
            state = read()
        seen += state[name].nbytes
        yield name, state[name]


def metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file. Raises ValueError."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # OSError and the library's exceptions
        raise ValueError(f"{path}: cannot be read as tensors: {_read_error(path, error)}") from None


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """SHA-256 of the file; `on_bytes` is called with the number of bytes of each read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(16 * 1024 * 1024):
            digest.update(piece)
            on_bytes(len(piece))
    return digest.hexdigest()


def listed(things: Sequence[str], between: str = ", ") -> str:
    """The items joined by `between`, at most MOST_LISTED of them."""
    more = len(things) - MOST_LISTED
    return between.join(map(str, things[:MOST_LISTED])) + (f"{between}and {more} more" if more > 0 else "")


def _open(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            # PyTorch needs UTF-8 names; Triton's Python uses ASCII, where other bytes are surrogates.
            name = str(path) if str(path).isascii() else f"/proc/self/fd/{file.fileno()}"
            return torch.load(name, map_location="cpu", weights_only=True, mmap=is_mapped(path))
    except Exception as error:  # each format has its own exceptions
        raise ValueError(f"{path}: cannot be read as tensors: {_read_error(path, error)}") from None


def _index(path: Path) -> dict[str, str]:
    """The shard of each tensor."""
    try:
        named: dict[str, str] = dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
        shards = {tensor: os.fsdecode(name.encode()) for tensor, name in named.items()}
        if any(Path(name).name != name for name in shards.values()):
            raise ValueError("a shard is not in the same folder")
    except OSError:
        raise ValueError(f"{path}: no such file") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {type(error).__name__}: {error}. Fetch it again") from None
    return shards


def _read_shards(path: Path) -> dict[str, Tensor]:
    shards = _index(path)
    names = sorted(set(shards.values()))
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ValueError(
            f"{path}: got {len(names) - len(missing)} of {len(names)} shards, missing {listed(missing)}: "
            "expected all of them in the same folder. Fetch those"
        )
    states = {name: read_tensors(path.parent / name) for name in names}
    if absent := [name for name, shard in shards.items() if name not in states[shard]]:
        raise ValueError(f"{path}: its shards lack {listed(absent)}, which it lists. Fetch all of them again")
    return {name: states[shard][name] for name, shard in shards.items()}


def _read_error(path: Path, error: Exception) -> str:
    """The problem of a file that cannot be read, and the remedy."""
    with path.open("rb") as file:
        size, head = path.stat().st_size, file.read(64)
    first_line = str(error).partition("\n")[0][:300]
    message, action = f"{type(error).__name__}: {first_line}", "Expected a file of tensors; fetch it again"
    if head.startswith(b"version https://git-lfs"):
        message, action = "it is a git-lfs pointer", "Fetch the file itself: git lfs pull"
    elif head[:1] == b"<":
        message, action = "it is a web page", "Fetch the file itself"
    elif path.suffix == ".safetensors":
        expected = _safetensors_bytes(path)
        if size < expected:
            message, action = f"it is cut off: got {size} bytes, expected {expected}", "Fetch it again"
    elif head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        message, action = f"it is cut off: got {size} bytes without the end of torch's archive", "Fetch it again"
    elif found := re.search(r"GLOBAL ([\w.]+)|WeightsUnpickler error:\s*([^\n]+)", str(error)):
        message = f"it contains code or objects ({found[1] or found[2]}), which were not run; expected only tensors"
        action = "Fetch it from its source, or save only its tensors with torch.save"
    return f"{message}. {action}"


def _safetensors_bytes(path: Path) -> int:
    """The file's size according to its header, or a lower bound if the header is incomplete."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8).ljust(8, b"\0"), "little")
        header = file.read(min(length, 100_000_000))
    try:
        entries = json.loads(header)
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
        return 8 + length + max(ends)
    except (ValueError, KeyError, TypeError, AttributeError):
        return 8 + length if 0 < length <= 100_000_000 else 8
