# SPDX-License-Identifier: Apache-2.0
"""Attention without a mask, by whichever of the kernels at hand is the fastest at the size that is served.

Used by the fused engine when it is built, and by the benchmark, which shows all of them.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_serve.config import NetworkConfig

log = logging.getLogger(__name__)

RUNS = 7
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, L, d], k and v [1, H, T, d] -> [1, H, L, d]: over all keys, without a mask."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from longlive_serve.kernels.attention import attention  # it needs Triton

    heads: Tensor = attention(q[0], k[0], v[0]).unflatten(-1, (q.shape[1], -1))
    return heads.transpose(0, 1)[None]


CANDIDATES: dict[str, Attend] = {
    "cudnn": functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "flash": functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "efficient": functools.partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "triton": _triton,
}
"""None of them changes what is computed but for the order of its sums."""


def fastest_attention(config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> Attend:
    """The fastest of CANDIDATES for a chunk against a full window; on a device without CUDA PyTorch's own choice."""
    if device.type != "cuda":
        return F.scaled_dot_product_attention
    q, k, v = example(config, device, dtype)
    seconds = {name: seconds_of(attend, q, k, v) for name, attend in CANDIDATES.items()}
    ran = {name: time for name, time in seconds.items() if time is not None}
    if not ran:
        log.info("attention: PyTorch's own choice, as none of %s runs here", ", ".join(CANDIDATES))
        return F.scaled_dot_product_attention
    best = min(ran, key=lambda name: ran[name])
    log.info("attention: %s (%s)", best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in ran.items()))
    return CANDIDATES[best]


def example(config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of a chunk and keys and values of a full window, [1, H, tokens, d], laid out as in a step."""
    heads, size = config.dit.num_heads, config.dit.head_dim
    chunk, window = (frames * config.tokens_per_frame for frames in (config.window.chunk, config.window.window))
    make = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    q = make((1, chunk, heads, size)).transpose(1, 2)
    return q, make((1, heads, window, size)), make((1, heads, window, size))


def seconds_of(attend: Attend, *tensors: Tensor) -> float | None:
    """The median time of a call on CUDA; None where it cannot run."""
    try:
        return _median(lambda: attend(*tensors))
    except RuntimeError as error:  # PyTorch's way to say that a backend has no kernel for this
        log.debug("attention: %s", error)
        return None


def _median(call: Callable[[], object]) -> float:
    times: list[float] = []
    for _ in range(RUNS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times[1:])  # the first one compiles
