# SPDX-License-Identifier: Apache-2.0
"""How long a chunk of LongLive 1.3B at 480x832 would take on a GPU, by operations and speeds; nothing here is measured
with our engines. Read by capacity.py.
"""

from __future__ import annotations

import dataclasses

from longlive_serve.config import TINY, WAN
from longlive_serve.doctor.memory import COMMON_GPUS

BF16, FP8 = PRECISIONS = ("bfloat16", "fp8")
PASSES = 5  # of the DiT in a chunk: 4 denoising steps and the commit
LINEAR_TFLOP, ATTENTION_TFLOP = 11.70, 16.59  # of one of them
DECODER_TFLOP = {WAN: 40.65, TINY: 1.58}  # for the 12 frames of a chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speeds:
    """TFLOP/s on one Hopper GPU, as kernels reach them."""

    linear: float
    attention: float


HOPPER = {
    # A product of 8192^3 measured on an H200; attention as cuDNN and FlashAttention-3 reach it.
    BF16: Speeds(linear=790, attention=600),
    # 1.6 times a bfloat16 product, as its inputs have to be quantized; attention as in FlashAttention-3's paper.
    FP8: Speeds(linear=1264, attention=960),
}
HOPPER_DECODER = {WAN: 350, TINY: 200}  # TFLOP/s; the tiny one is bound by memory and launches
PEAK_BF16_TFLOPS = {"H200": 989, "H100 80 GB": 989, "L40S": 362, "RTX 4090": 165}  # data sheets: dense, sums in float32
GPUS = tuple(PEAK_BF16_TFLOPS)


def memory_of(gpu: str) -> int:
    return COMMON_GPUS[gpu]


def chunk_seconds(gpu: str, precision: str, decoder: str) -> float:
    """On Hopper by the speeds above; on others as much slower as their data sheets say."""
    speeds, slower = HOPPER[precision], PEAK_BF16_TFLOPS["H200"] / PEAK_BF16_TFLOPS[gpu]
    dit = PASSES * (LINEAR_TFLOP / speeds.linear + ATTENTION_TFLOP / speeds.attention)
    return slower * (dit + DECODER_TFLOP[decoder] / HOPPER_DECODER[decoder])
