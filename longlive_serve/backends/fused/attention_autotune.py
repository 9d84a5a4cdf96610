# SPDX-License-Identifier: Apache-2.0
"""Selects the fastest attention kernel, without a mask, that is correct at every served size; also for FP8.

Used by the fused backend when it is built, and by the benchmark, which shows all kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longlive_serve.backends.device_timer import median_seconds
from longlive_serve.backends.fused.cudnn_attention import CudnnAttention
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.backends.start_up import CHOOSE, phase
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8, to_8_bit

log = logging.getLogger(__name__)

RUNS = 7
OFF_16_BIT, OFF_FP8 = 0.02, 0.1
"""Tolerances of the relative error (norm of the difference / norm): five times the error of rounding. The error of a
wrong kernel is far larger."""
AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q [1, H, L, d], k and v [1, H, T, d] -> [1, H, L, d]: over all keys, without a mask."""
FP8AttentionFn = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""FP8 (E4M3) q [H, L, d], k and v [H, T, d], and their scales [3] -> FP8 [L, H * d] with the scale of v."""


def _sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from longlive_serve.kernels.attention import attention  # needs Triton

    heads: Tensor = attention(q[0], k[0], v[0]).unflatten(-1, (q.shape[1], -1))
    return heads.transpose(0, 1)[None]


KERNELS: dict[str, AttentionFn] = {
    "cudnn": functools.partial(_sdpa, backend=SDPBackend.CUDNN_ATTENTION),
    "flash": functools.partial(_sdpa, backend=SDPBackend.FLASH_ATTENTION),
    "efficient": functools.partial(_sdpa, backend=SDPBackend.EFFICIENT_ATTENTION),
    "triton": _triton,
}
"""They compute the same function and differ only in the order of summation."""


def fp8_kernels(device: torch.device) -> dict[str, FP8AttentionFn | Exception]:
    """The FP8 kernels, or for an unavailable one the reason."""
    from longlive_serve.kernels.attention import attention_fp8  # needs Triton

    kernels: dict[str, FP8AttentionFn | Exception] = {"triton fp8": attention_fp8}
    if device.type == "cuda":
        try:
            kernels["cudnn fp8"] = CudnnAttention(device)
        except (ImportError, RuntimeError) as error:
            kernels["cudnn fp8"] = error
    return kernels


class Candidate(NamedTuple):
    """A kernel bound to the example's tensors."""

    run: Callable[[int, int], Tensor]
    """(number of queries, number of keys) -> output."""
    head: Callable[[Tensor], Tensor]
    """The first head of an output, float32 [L, d]."""


@phase(CHOOSE)
def select_attention(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> AttentionFn:
    """The fastest of KERNELS for a chunk and a full window; on a device without CUDA, PyTorch's default."""
    if device.type != "cuda":
        return F.scaled_dot_product_attention
    q, k, v = example(config, device, dtype, config.window.window)

    def to_candidate(attention_fn: AttentionFn) -> Candidate:
        return Candidate(
            run=lambda q_len, kv_len: attention_fn(q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len]),
            head=lambda out: out[0, 0].float(),
        )

    candidates = {name: to_candidate(attention_fn) for name, attention_fn in KERNELS.items()}
    best = _select_fastest("attention", candidates, config, functools.partial(_exact, q, k, v), OFF_16_BIT)
    return KERNELS[best] if best else F.scaled_dot_product_attention


@phase(CHOOSE)
def select_fp8_attention(config: ModelConfig, device: torch.device) -> FP8AttentionFn:
    """The fastest FP8 kernel, or the Triton kernel if none can be timed."""
    kernels = fp8_kernels(device)
    available = {name: kernel for name, kernel in kernels.items() if not isinstance(kernel, Exception)}
    for name in kernels.keys() - available.keys():
        log.info("attention in FP8: %s is not available: %s", name, kernels[name])
    if device.type != "cuda":
        return available["triton fp8"]
    q, k, v, scales = in_fp8(*example(config, device, torch.bfloat16, config.window.window))

    def to_candidate(attention_fn: FP8AttentionFn) -> Candidate:
        return Candidate(
            run=lambda q_len, kv_len: attention_fn(q[:, :q_len], k[:, :kv_len], v[:, :kv_len], scales),
            head=lambda out: out[:, : q.shape[-1]].float() * scales[2],
        )

    candidates = {name: to_candidate(attention_fn) for name, attention_fn in available.items()}
    float_qkv = [(x.float() * scale)[None] for x, scale in zip((q[:1], k[:1], v[:1]), scales, strict=True)]
    if isinstance(cudnn := available.get("cudnn fp8"), CudnnAttention):
        _build(cudnn, candidates["cudnn fp8"], config)
    best = _select_fastest("attention in FP8", candidates, config, functools.partial(_exact, *float_qkv), OFF_FP8)
    return available[best or "triton fp8"]


def _build(cudnn: CudnnAttention, candidate: Candidate, config: ModelConfig) -> None:
    try:
        with cudnn.record_calls():
            for size in sizes(config):
                candidate.run(*size)
    except RuntimeError as error:
        log.info("attention in FP8: cuDNN: %s", error)  # it fails again in the selection


def sizes(config: ModelConfig) -> list[tuple[int, int]]:
    """(queries, keys) of every possible call; first that of a step with a full window."""
    window, rows = config.window, config.window.chunk * config.tokens_per_frame
    found = [(rows * chunks, rows * blocks) for chunks, blocks in Window(window).call_sizes()]
    usual = rows, window.window * config.tokens_per_frame
    return sorted(found, key=lambda size: size != usual)


def example(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, frames: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries of `frames` latent frames (default: a chunk), and keys and values of a full window:
    [1, H, tokens, d], with the strides of a step."""
    heads, size = config.dit.num_heads, config.dit.head_dim
    queries, window = (n * config.tokens_per_frame for n in (frames or config.window.chunk, config.window.window))
    make = functools.partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=dtype)
    q = make((1, queries, heads, size)).transpose(1, 2)
    return q, make((1, heads, window, size)), make((1, heads, window, size))


def in_fp8(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, H, tokens, d] -> the same [H, tokens, d] in FP8 (E4M3), and their scales [3]."""
    scales = torch.stack([x.abs().amax().float() / LARGEST_FP8 for x in (q, k, v)])
    quantized = [to_8_bit(x[0], scale, torch.float8_e4m3fn) for x, scale in zip((q, k, v), scales, strict=True)]
    return quantized[0], quantized[1], quantized[2], scales


def _exact(q: Tensor, k: Tensor, v: Tensor, q_len: int, kv_len: int) -> Tensor:
    """The first head, float32 [L, d]."""
    head = [x[:, :1, :rows].float() for x, rows in ((q, q_len), (k, kv_len), (v, kv_len))]
    return _sdpa(head[0], head[1], head[2], SDPBackend.MATH)[0, 0]


def _select_fastest(
    label: str,
    candidates: Mapping[str, Candidate],
    config: ModelConfig,
    exact: Callable[[int, int], Tensor],
    tolerance: float,
) -> str | None:
    """The fastest candidate at the first of `sizes` among those correct at all sizes; None if there is none. Logs all
    times. `tolerance`: largest relative error."""
    seconds: dict[str, float] = {}
    for name, candidate in candidates.items():
        try:
            errors = {
                size: relative_error(candidate.head(candidate.run(*size)), exact(*size)) for size in sizes(config)
            }
            size, max_error = max(errors.items(), key=lambda one: one[1])
            if max_error < tolerance:
                seconds[name] = median_seconds(functools.partial(candidate.run, *sizes(config)[0]), "cuda", RUNS)
            else:
                log.warning("%s: %s is wrong: error %.3g with %d queries and %d keys", label, name, max_error, *size)
        except Exception as error:  # PyTorch, Triton and cuDNN report a missing kernel by different exceptions
            log.debug("%s: %s: %s: %s", label, name, type(error).__name__, error)
    if not seconds:
        log.info("%s: none of %s works", label, ", ".join(candidates))
        return None
    best = min(seconds, key=lambda name: seconds[name])
    log.info("%s: %s (%s)", label, best, ", ".join(f"{name} {1e3 * time:.2f} ms" for name, time in seconds.items()))
    return best
