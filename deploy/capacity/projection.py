# SPDX-License-Identifier: Apache-2.0
"""Projects the time per chunk of LongLive 1.3B at 480x832 on a GPU from FLOPs, bytes and kernel launches. Nothing here
is measured with our backends. Used by `deploy.capacity`.
"""

from __future__ import annotations

import dataclasses
import math

from longlive_serve.config.presets import PRESETS, TINY, WAN
from longlive_serve.doctor.memory import COMMON_GPUS

FULL = PRESETS["longlive-1.3b"]
BF16, FP8 = PRECISIONS = ("bfloat16", "fp8")
PASSES = 5  # DiT forwards per chunk: 4 denoising steps and the KV-cache update, which skips the last layer
SMS = 132  # of a Hopper GPU: a kernel's tiles run in waves of SMS; a partial last wave takes as long as a full one
ROWS, COLUMNS = 128, 256  # a GEMM tile, for one SM; an attention tile is ROWS queries of a head
MEASURED = 8192  # size of the square GEMM with a known speed
LAUNCH_S = 1.5e-6  # between two kernels of a CUDA graph
HOST_S = 3e-3  # copies of noise to the device and frames from it


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelSpeeds:
    """Speeds of the DiT's kernels on one Hopper GPU."""

    linear: float
    """FLOP/s of the GEMM of size MEASURED."""
    attention: float
    """FLOP/s of attention with full waves."""
    layer_bytes: float
    """Bytes read and written by the norms, RoPE and GELU of a layer."""
    launches: int
    """Kernel launches per chunk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoder:
    """Work of a decoder for the 12 frames of a chunk, in bfloat16."""

    operations: float
    bytes: float
    """Without the bytes of the convolutions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPU:
    """Data-sheet values."""

    flops: float
    """bfloat16, dense, float32 accumulation."""
    bytes_per_s: float


HOPPER = {
    BF16: KernelSpeeds(linear=790e12, attention=667e12, layer_bytes=484e6, launches=2130),
    FP8: KernelSpeeds(linear=1264e12, attention=1036e12, layer_bytes=421e6, launches=2400),
}
CONVOLUTIONS = 430e12  # operations per second on Hopper
REACHED = 0.75  # share of the data-sheet bandwidth
DECODER = {WAN: Decoder(operations=40.65e12, bytes=45e9), TINY: Decoder(operations=0, bytes=36e9)}  # TINY: memory-bound
GPUS = {
    "H200": GPU(flops=989e12, bytes_per_s=4.8e12),
    "H100 80 GB": GPU(flops=989e12, bytes_per_s=3.35e12),
    "L40S": GPU(flops=362e12, bytes_per_s=0.864e12),
    "RTX 4090": GPU(flops=165e12, bytes_per_s=1.008e12),
}


def memory_of(gpu: str) -> int:
    return COMMON_GPUS[gpu]


def wave_utilization(tiles: int) -> float:
    """Utilization of the waves with this many tiles."""
    return tiles / (math.ceil(tiles / SMS) * SMS)


def product_tiles(rows: int, columns: int) -> int:
    return math.ceil(rows / ROWS) * math.ceil(columns / COLUMNS)


def layer_seconds(speeds: KernelSpeeds) -> float:
    """GEMMs and attention of a layer on a Hopper GPU, for a chunk with a full window."""
    dit, tokens = FULL.dit, FULL.window.chunk * FULL.tokens_per_frame
    keys = FULL.window.window * FULL.tokens_per_frame + dit.text_len
    of_full_waves = speeds.linear / wave_utilization(product_tiles(MEASURED, MEASURED))
    products = [(3 * dit.dim, dit.dim), *3 * [(dit.dim, dit.dim)], (dit.ffn_dim, dit.dim), (dit.dim, dit.ffn_dim)]
    linear = sum(
        2 * tokens * columns * depth / (of_full_waves * wave_utilization(product_tiles(tokens, columns)))
        for columns, depth in products
    )
    full = wave_utilization(dit.num_heads * math.ceil(tokens / ROWS))
    return linear + 4 * tokens * keys * dit.dim / (speeds.attention * full)


def chunk_seconds(gpu: str, precision: str, decoder: str) -> float:
    """On Hopper with the speeds above; other GPUs are scaled by their data sheets."""
    speeds, work, layers = HOPPER[precision], DECODER[decoder], PASSES * FULL.dit.num_layers - 1
    slowdown = GPUS["H200"].flops / GPUS[gpu].flops
    computed = slowdown * (layers * layer_seconds(speeds) + work.operations / CONVOLUTIONS)
    moved = (layers * speeds.layer_bytes + work.bytes) / (REACHED * GPUS[gpu].bytes_per_s)
    return computed + moved + speeds.launches * LAUNCH_S + HOST_S
