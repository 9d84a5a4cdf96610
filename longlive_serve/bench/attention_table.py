# SPDX-License-Identifier: Apache-2.0
"""All the attention kernels at hand, side by side: the queries of a chunk against the keys of a full window.

That is more than half of a step's operations. Errors are against PyTorch in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_serve.bench.timing import seconds_of
from longlive_serve.config import NetworkConfig
from longlive_serve.engines.attention_choice import CANDIDATES, Attend, example

DEFAULT = "torch's choice"


def measure_attention(config: NetworkConfig, device: str, dtype: str) -> dict[str, Any]:
    """Seconds, operations per second and relative error of every kernel; of those that do not run here the reason."""
    on_cuda = device.startswith("cuda")
    heads, size = config.dit.num_heads, config.dit.head_dim
    q, k, v = example(config, torch.device(device), getattr(torch, dtype))
    chunk, window = q.shape[2], k.shape[2]
    expected, kernels = exact(q, k, v), []
    for name, attend in _candidates(on_cuda).items():
        facts: dict[str, Any] = {"name": name}
        try:
            difference = attend(q, k, v).float() - expected
            facts["seconds"] = seconds_of(functools.partial(attend, q, k, v), device, 50 if on_cuda else 5)
        except Exception as error:  # torch, Triton and imports have kinds of their own for what does not run here
            facts["reason"] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            facts["flops"] = 4 * chunk * window * heads * size / facts["seconds"]["median"]
            facts["relative_error"] = (difference.abs().max() / expected.abs().max()).item()
        kernels.append(facts)
    return {"heads": heads, "head_dim": size, "queries": chunk, "keys": window, "dtype": dtype, "kernels": kernels}


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """In float32, one head at a time: all of them at once would take gigabytes."""
    heads = zip(*(x.split(1, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([_math(*(x.float() for x in head)) for head in heads], dim=1)


def _candidates(on_cuda: bool) -> dict[str, Attend]:
    """Those that the fused engine chooses from, and for comparison others that it does not."""
    candidates: dict[str, Attend] = {DEFAULT: F.scaled_dot_product_attention}
    return candidates | CANDIDATES | {"math": _math, "triton fp8": _triton_fp8} if on_cuda else candidates


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def _triton_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from longlive_serve.kernels.attention import attention_fp8  # it needs Triton

    heads: Tensor = attention_fp8(q[0], k[0], v[0]).unflatten(-1, (q.shape[1], -1))
    return heads.transpose(0, 1)[None]
