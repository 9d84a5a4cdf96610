# SPDX-License-Identifier: Apache-2.0
"""Attention without a mask, by whichever of the kernels at hand is the fastest at the size that is served; in FP8 too.

Used by the fused engine when it is built, and by the benchmark, which shows all of them.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_serve.config import NetworkConfig
from longlive_serve.engines.cudnn_attention import CudnnAttention
from longlive_serve.models.quantized import LARGEST_FP8, to_8_bit

log = logging.getLogger(__name__)

RUNS = 7
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, L, d], k and v [1, H, T, d] -> [1, H, L, d]: over all keys, without a mask."""
AttendFP8 = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FP8 (E4M3) q [H, L, d], k and v [H, T, d], and their scales [3] -> FP8 [L, H * d] with the scale of v."""


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


def fp8_candidates(device: torch.device) -> dict[str, AttendFP8 | Exception]:
    """Those that take FP8; instead of one that cannot be had the reason."""
    from longlive_serve.kernels.attention import attention_fp8  # it needs Triton

    candidates: dict[str, AttendFP8 | Exception] = {"triton fp8": attention_fp8}
    if device.type == "cuda":
        try:
            candidates["cudnn fp8"] = CudnnAttention(device)
        except (ImportError, RuntimeError) as error:
            candidates["cudnn fp8"] = error
    return candidates


def fastest_attention(config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> Attend:
    """The fastest of CANDIDATES for a chunk against a full window; on a device without CUDA PyTorch's own choice."""
    if device.type != "cuda":
        return F.scaled_dot_product_attention
    tensors = example(config, device, dtype)
    best = _fastest("attention", {name: functools.partial(attend, *tensors) for name, attend in CANDIDATES.items()})
    return CANDIDATES[best] if best else F.scaled_dot_product_attention


def fastest_fp8_attention(config: NetworkConfig, device: torch.device) -> AttendFP8:
    """The fastest of those that take FP8, or our own kernel where none can be timed."""
    candidates = fp8_candidates(device)
    there = {name: attend for name, attend in candidates.items() if not isinstance(attend, Exception)}
    for name in candidates.keys() - there.keys():
        log.info("attention in FP8: no %s: %s", name, candidates[name])
    if device.type != "cuda":
        return there["triton fp8"]
    small = in_fp8(*example(config, device, torch.bfloat16))
    best = _fastest("attention in FP8", {name: functools.partial(attend, *small) for name, attend in there.items()})
    return there[best or "triton fp8"]


def example(config: NetworkConfig, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of a chunk and keys and values of a full window, [1, H, tokens, d], laid out as in a step."""
    heads, size = config.dit.num_heads, config.dit.head_dim
    chunk, window = (frames * config.tokens_per_frame for frames in (config.window.chunk, config.window.window))
    make = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    q = make((1, chunk, heads, size)).transpose(1, 2)
    return q, make((1, heads, window, size)), make((1, heads, window, size))


def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, tokens, d] -> the same [H, tokens, d] in FP8 (E4M3), and their scales [3]."""
    scales = torch.stack([x.abs().amax().float() / LARGEST_FP8 for x in (q, k, v)])
    small = [to_8_bit(x[0], scale, torch.float8_e4m3fn) for x, scale in zip((q, k, v), scales, strict=True)]
    return small[0], small[1], small[2], scales


def _fastest(what: str, calls: Mapping[str, Callable[[], object]]) -> str | None:
    """The name of the fastest call, None if none runs here; the log says what each took."""
    seconds = {name: seconds_of(call) for name, call in calls.items()}
    ran = {name: time for name, time in seconds.items() if time is not None}
    if not ran:
        log.info("%s: none of %s runs here", what, ", ".join(calls))
        return None
    best = min(ran, key=lambda name: ran[name])
    log.info("%s: %s (%s)", what, best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in ran.items()))
    return best


def seconds_of(call: Callable[[], object]) -> float | None:
    """The median time of a call on CUDA; None where it cannot run."""
    try:
        return _median(call)
    except Exception as error:  # PyTorch, Triton and cuDNN each have their own way to say that they have no kernel
        log.debug("attention: %s: %s", type(error).__name__, error)
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
