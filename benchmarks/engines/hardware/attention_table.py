# SPDX-License-Identifier: Apache-2.0
"""Compares all available attention kernels: the queries of one chunk against the keys of a full window.

This attention is more than half of a step's FLOPs. Errors are relative to PyTorch in float32. FP8 kernels get FP8
inputs, because in the fused backend the preceding kernels quantize queries, keys and values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import seconds_of
from longlive_serve.backends.fused.attention_autotune import (
    KERNELS,
    AttentionFn,
    FP8AttentionFn,
    example,
    fp8_kernels,
    in_fp8,
)
from longlive_serve.config.presets import ModelConfig

DEFAULT = "torch's choice"
Call = tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]
"""The timed function, and the conversion of its result to float32 [1, H, L, d]."""


def measure_attention(config: ModelConfig, device: str, dtype: str, flex: bool) -> dict[str, Any]:
    """Seconds, FLOP/s and relative error of every kernel, or the reason why it does not run on this machine."""
    on_cuda = device.startswith("cuda")
    heads, size = config.dit.num_heads, config.dit.head_dim
    q, k, v = example(config, torch.device(device), getattr(torch, dtype))
    chunk, window = q.shape[2], k.shape[2]
    expected, kernels = exact(q, k, v), []
    calls = {name: _call(attend, q, k, v) for name, attend in _candidates(on_cuda, flex).items()}
    calls |= _calls_in_fp8(q, k, v) if on_cuda else {}
    for name, (call, to_float32) in calls.items():
        result: dict[str, Any] = {"name": name}
        try:
            diff = to_float32(call()) - expected
            result["seconds"] = seconds_of(call, device, 50 if on_cuda else 5)
        except Exception as error:  # torch, Triton and imports raise different types
            result["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            result["flops"] = 4 * chunk * window * heads * size / result["seconds"]["median"]
            result["relative_error"] = (diff.abs().max() / expected.abs().max()).item()
        kernels.append(result)
    return {"heads": heads, "head_dim": size, "queries": chunk, "keys": window, "dtype": dtype, "kernels": kernels}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, one head at a time: all heads at once would take gigabytes."""
    heads = zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_math(*(x.float() for x in head)) for head in heads], dim=1)


def _call(attend: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Call:
    return functools.partial(attend, q, k, v), Tensor.float


def _candidates(on_cuda: bool, flex: bool) -> dict[str, AttentionFn]:
    """The kernels that the fused backend chooses from, and others for comparison."""
    candidates: dict[str, AttentionFn] = {DEFAULT: F.scaled_dot_product_attention}
    if not on_cuda:
        return candidates
    return candidates | KERNELS | ({"flex": _flex} if flex else {}) | {"math": _math}


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v)


@functools.cache
def _compiled_flex() -> AttentionFn:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: AttentionFn = torch.compile(flex_attention)
    return compiled


def _calls_in_fp8(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Call]:
    fp8_inputs = in_fp8(q, k, v)

    def of(attend: FP8AttentionFn | Exception) -> Tensor:
        if isinstance(attend, Exception):
            raise attend
        return attend(*fp8_inputs)

    def to_float32(out: Tensor) -> Tensor:
        heads: Tensor = (out.float() * fp8_inputs[3][2]).unflatten(-1, (q.shape[1], -1))
        return heads.transpose(0, 1)[None]

    return {name: (functools.partial(of, attend), to_float32) for name, attend in fp8_kernels(q.device).items()}
