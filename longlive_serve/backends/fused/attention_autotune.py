# SPDX-License-Identifier: Apache-2.0
"""Attention without a mask, by whichever of the kernels at hand is the fastest of those that are right at every size
that is served; in FP8 too.

Used by the fused backend when it is built, and by the benchmark, which shows all of them.
"""

from __future__ import annotations

import functools
import logging
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_serve.backends.fused.cudnn_attention import CudnnAttention
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.backends.start_up import CHOOSE, phase
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8, to_8_bit

log = logging.getLogger(__name__)

RUNS = 7
OFF_16_BIT, OFF_FP8 = 0.02, 0.1
"""What a result may be off, as the norm of the difference by the norm: rounding makes it a fifth of that. What a wrong
kernel gives has little to do with what is right."""
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


class Trial(NamedTuple):
    """A kernel on the example's tensors."""

    run: Callable[[int, int], Tensor]
    """Of so many queries and keys."""
    head: Callable[[Tensor], Tensor]
    """The first head of what it gave, float32 [L, d]."""


@phase(CHOOSE)
def fastest_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Attend:
    """The fastest of CANDIDATES for a chunk against a full window; on a device without CUDA PyTorch's own choice."""
    if device.type != "cuda":
        return F.scaled_dot_product_attention
    q, k, v = example(config, device, dtype, config.window.window)

    def trial(attend: Attend) -> Trial:
        return Trial(
            run=lambda queries, keys: attend(q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]),
            head=lambda out: out[0, 0].float(),
        )

    trials = {name: trial(attend) for name, attend in CANDIDATES.items()}
    best = _fastest("attention", trials, config, functools.partial(_exact, q, k, v), OFF_16_BIT)
    return CANDIDATES[best] if best else F.scaled_dot_product_attention


@phase(CHOOSE)
def fastest_fp8_attention(config: ModelConfig, device: torch.device) -> AttendFP8:
    """The fastest of those that take FP8, or our own kernel where none can be timed."""
    candidates = fp8_candidates(device)
    there = {name: attend for name, attend in candidates.items() if not isinstance(attend, Exception)}
    for name in candidates.keys() - there.keys():
        log.info("attention in FP8: no %s: %s", name, candidates[name])
    if device.type != "cuda":
        return there["triton fp8"]
    q, k, v, scales = in_fp8(*example(config, device, torch.bfloat16, config.window.window))

    def trial(attend: AttendFP8) -> Trial:
        return Trial(
            run=lambda queries, keys: attend(q[:, :queries], k[:, :keys], v[:, :keys], scales),
            head=lambda out: out[:, : q.shape[-1]].float() * scales[2],
        )

    trials = {name: trial(attend) for name, attend in there.items()}
    wide = [(x.float() * scale)[None] for x, scale in zip((q[:1], k[:1], v[:1]), scales, strict=True)]
    if isinstance(cudnn := there.get("cudnn fp8"), CudnnAttention):
        _build(cudnn, trials["cudnn fp8"], config)
    best = _fastest("attention in FP8", trials, config, functools.partial(_exact, *wide), OFF_FP8)
    return there[best or "triton fp8"]


def _build(cudnn: CudnnAttention, trial: Trial, config: ModelConfig) -> None:
    try:
        with cudnn.noting():
            for size in sizes(config):
                trial.run(*size)
    except RuntimeError as error:
        log.info("attention in FP8: cuDNN: %s", error)  # it fails once more when it is tried


def sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """(queries, keys) of every call that a session can come to; that of a step with a full window is the first."""
    window, rows = config.window, config.window.chunk * config.tokens_per_frame
    found = [(rows * chunks, rows * blocks) for chunks, blocks in Window(window).call_sizes()]
    usual = rows, window.window * config.tokens_per_frame
    return sorted(found, key=lambda size: size != usual)


def example(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, frames: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of so many latent frames (default: a chunk) and keys and values of a full window,
    [1, H, tokens, d], laid out as in a step."""
    heads, size = config.dit.num_heads, config.dit.head_dim
    queries, window = (n * config.tokens_per_frame for n in (frames or config.window.chunk, config.window.window))
    make = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    q = make((1, queries, heads, size)).transpose(1, 2)
    return q, make((1, heads, window, size)), make((1, heads, window, size))


def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, tokens, d] -> the same [H, tokens, d] in FP8 (E4M3), and their scales [3]."""
    scales = torch.stack([x.abs().amax().float() / LARGEST_FP8 for x in (q, k, v)])
    small = [to_8_bit(x[0], scale, torch.float8_e4m3fn) for x, scale in zip((q, k, v), scales, strict=True)]
    return small[0], small[1], small[2], scales


def _exact(q: Tensor, k: Tensor, v: Tensor, queries: int, keys: int) -> Tensor:
    """The first head, float32 [L, d]."""
    head = [x[:, :1, :rows].float() for x, rows in ((q, queries), (k, keys), (v, keys))]
    return _sdpa(head[0], head[1], head[2], SDPBackend.MATH)[0, 0]


def _fastest(
    what: str, trials: Mapping[str, Trial], config: ModelConfig, exact: Callable[[int, int], Tensor], most: float
) -> str | None:
    """The name of the fastest at the first of `sizes` that is right at all of them; None if none is. The log says what
    each took. Of a result `most` may be off."""
    seconds: dict[str, float] = {}
    for name, trial in trials.items():
        try:
            off = {size: relative_error(trial.head(trial.run(*size)), exact(*size)) for size in sizes(config)}
            size, worst = max(off.items(), key=lambda one: one[1])
            if worst < most:
                seconds[name] = _median(functools.partial(trial.run, *sizes(config)[0]))
            else:
                log.warning("%s: %s is wrong: %.3g off with %d queries and %d keys", what, name, worst, *size)
        except Exception as error:  # PyTorch, Triton and cuDNN each have their own way to say that they have no kernel
            log.debug("%s: %s: %s: %s", what, name, type(error).__name__, error)
    if not seconds:
        log.info("%s: none of %s runs here", what, ", ".join(trials))
        return None
    best = min(seconds, key=lambda name: seconds[name])
    log.info("%s: %s (%s)", what, best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in seconds.items()))
    return best


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
