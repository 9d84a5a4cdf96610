# SPDX-License-Identifier: Apache-2.0
"""Where kernels run, and the tile sizes of kernels that work on whole rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """The block [rows, block] that one program works on, and its number of warps."""

    rows: int
    block: int
    num_warps: int


def interpreted() -> bool:
    """Whether kernels run on the CPU, in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


def check_kernels(device: torch.device) -> None:
    """Raises ValueError if the kernels cannot run on `device`."""
    if device.type != "cuda" and not interpreted():
        raise ValueError(f"backend: got fused on {device.type}, expected a GPU: its kernels are compiled for one")


def tile_of(width: int, rows: int) -> Tile:
    """The tile for `rows` rows of `width` numbers: one row on a GPU, several if they are short.

    The interpreter's time depends on the number of programs and not on their size, so its tiles are large.
    """
    block = triton.next_power_of_2(width)
    size = 2**18 if interpreted() else 2**11
    return Tile(
        rows=min(max(1, size // block), triton.next_power_of_2(rows)), block=block, num_warps=8 if block >= 2**13 else 4
    )
