# SPDX-License-Identifier: Apache-2.0
"""Writes a .safetensors file tensor by tensor, with only one tensor in memory at a time.

Called by `convert`. Source of the format: github.com/huggingface/safetensors (a length, a JSON header, the bytes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def size_of(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype) -> int:
    """Size of tensors of these shapes in bytes."""
    return sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize


def write_tensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
) -> None:
    """Write `tensors` as `dtype`, in the order of `shapes`; `on_bytes` is called with the bytes of each tensor.

    The file is written as `path`.partial and renamed when it is complete.
    """
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        header = _header(shapes, dtype, metadata)
        file.write(len(header).to_bytes(8, "little") + header)
        for name, (got, tensor) in zip(shapes, tensors, strict=True):
            assert name == got, f"{path}: got {got}, expected {name}"
            file.write(tensor.to(dtype).contiguous().flatten().view(torch.uint8).numpy().data)
            on_bytes(tensor.numel() * dtype.itemsize)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _header(shapes: Mapping[str, Sequence[int]], dtype: torch.dtype, metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, shape in shapes.items():
        end = begin + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries).encode()
    return header + b" " * (-len(header) % 8)  # aligns tensors in a mapped file
