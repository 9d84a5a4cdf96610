# SPDX-License-Identifier: Apache-2.0
"""The device's own speed, measured in the same run as the backends: plain matrix products and copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.engines.hardware import flops
from benchmarks.timing import seconds_of
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8, to_8_bit

FP8 = "float8_e4m3fn"


def measure_roofline(device: str, dtype: str) -> dict[str, Any]:
    """FLOP/s of matrix products, and bytes per second that a copy reads and writes.

    `dtype`: the models'; bfloat16 and FP8 are always measured. A dtype that does not run on this device has the value
    None and an entry in `reasons`.
    """
    on_cuda = device.startswith("cuda")
    size, runs = (8192, 50) if on_cuda else (512, 5)
    results: dict[str, Any] = {"size": size, "flops": {}, "seconds": {}, "reasons": {}}
    for name in dict.fromkeys(("bfloat16", FP8, dtype)):
        make = _fp8_product if name == FP8 else _product
        try:
            seconds = seconds_of(make(size, device, name), device, runs)
        except Exception as error:  # torch raises different types for unsupported dtypes
            results["flops"][name] = None
            results["reasons"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            results["flops"][name] = 2 * size**3 / seconds["median"]
            results["seconds"][name] = seconds
    results |= _copy(2**32 if on_cuda else 2**22, device, runs)
    return results


def _product(size: int, device: str, dtype: str) -> Callable[[], object]:
    """Random values, because a GPU multiplies zeros faster: it draws less power."""
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return lambda: a @ b


def _fp8_product(size: int, device: str, dtype: str) -> Callable[[], object]:
    """With one scale per row of `a` and per column of `b`, as in the fused backend."""
    (a, scale_a), (b, scale_b) = (to_fp8(torch.randn(size, size, device=device)) for _ in range(2))
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a, scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=device.startswith("cuda")
    )


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(1, keepdim=True) / LARGEST_FP8
    return to_8_bit(x, scale, torch.float8_e4m3fn), scale


def _copy(size: int, device: str, runs: int) -> dict[str, Any]:
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, runs)
    return {"copy_bytes_per_s": 2 * size / seconds["median"], "copy_seconds": seconds}


def achieved(results: dict[str, Any], config: ModelConfig, decoder: str, baseline: bool) -> dict[str, float]:
    """FLOP/s of a row's parts, counting all work that its backend does: the baseline's includes unused results."""
    work = {
        "dit": (flops.dit_chunk(config, whole_update=baseline), results["dit_s"]),
        "recache": (flops.recache(config, whole=baseline), results["recache_s"]),
        "decode": (flops.decoder_chunk(config, decoder), results["phases_s"]["decode"]),
    }
    return {part: operations / seconds["median"] for part, (operations, seconds) in work.items() if seconds["median"]}


def shares(achieved_flops: dict[str, float], roofline: dict[str, Any], dtype: str) -> dict[str, float]:
    """`achieved_flops` relative to the device's matrix product in `dtype`; empty if that did not run."""
    fastest = roofline["flops"][dtype]
    return {part: speed / fastest for part, speed in achieved_flops.items()} if fastest else {}
