# SPDX-License-Identifier: Apache-2.0
"""The parts of a chunk, each alone: what docs/performance.md estimates a chunk's time from, measured line by line.

Called by `tests.project.gpu_check`. Shapes are those of a step with a full window; every function gives seconds, and
what was multiplied or moved in them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.engines.hardware.attention_table import exact
from benchmarks.engines.hardware.roofline import to_fp8
from benchmarks.timing import seconds_of
from longlive_serve.backends.fused.attention_autotune import KERNELS, AttentionFn, example, fp8_kernels, in_fp8, sizes
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.config.presets import ModelConfig
from longlive_serve.kernels.norm_silu import norm_silu
from longlive_serve.kernels.norms import residual_norm, rms_norm
from longlive_serve.kernels.quantize import gelu, quantize_rows
from longlive_serve.kernels.rotary import norm_rotate_write, rotate_keys


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What is measured on, and how often."""

    config: ModelConfig
    device: str
    dtype: torch.dtype
    runs: int = 20

    @property
    def tokens(self) -> int:
        return self.config.window.chunk * self.config.tokens_per_frame

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def seconds(self, call: Callable[[], object]) -> float | str:
        """The median, or why it does not run here."""
        try:
            return seconds_of(call, self.device, self.runs)["median"]
        except Exception as error:  # each library has its own kinds
            return f"{type(error).__name__}: {error}".splitlines()[0]


def attention(machine: Machine) -> dict[str, Any]:
    """Every kernel at every size that a session can come to: seconds and relative error."""
    config, device = machine.config, torch.device(machine.device)
    q, k, v = example(config, device, machine.dtype, config.window.window)
    small = in_fp8(q, k, v)
    kernels: dict[str, AttentionFn] = {"torch": F.scaled_dot_product_attention, **KERNELS}
    in_8_bit = {name: one for name, one in fp8_kernels(device).items() if not isinstance(one, Exception)}

    def plain(out: Tensor) -> Tensor:
        return out.float()

    def wide(out: Tensor) -> Tensor:
        heads: Tensor = (out.float() * small[3][2]).unflatten(-1, (q.shape[1], -1))
        return heads.transpose(0, 1)[None]

    found: dict[str, Any] = {}
    for queries, keys in sizes(config):
        parts = q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]
        parts8 = small[0][:, :queries], small[1][:, :keys], small[2][:, :keys], small[3]
        calls = {name: (functools.partial(attend, *parts), plain) for name, attend in kernels.items()}
        calls |= {name: (functools.partial(attend8, *parts8), wide) for name, attend8 in in_8_bit.items()}
        expected, of_size = exact(*parts), {}
        for name, (call, whole) in calls.items():
            seconds = machine.seconds(call)
            error = relative_error(whole(call()), expected) if isinstance(seconds, float) else None
            of_size[name] = {"seconds": seconds, "error": error}
        found[f"{queries} to {keys}"] = of_size
    return found


def products(machine: Machine) -> dict[str, Any]:
    """The linear layers of a block: in 16 bits, in FP8, and with GELU in the product's own kernel."""
    dit, rows = machine.config.dit, machine.tokens
    shapes = {"qkv": (dit.dim, 3 * dit.dim), "o": (dit.dim, dit.dim)}
    shapes |= {"ffn in": (dit.dim, dit.ffn_dim), "ffn out": (dit.ffn_dim, dit.dim)}
    found: dict[str, Any] = {}
    for name, (inputs, outputs) in shapes.items():
        x, weight, bias = machine.random(rows, inputs), machine.random(outputs, inputs), machine.random(outputs)
        (x8, x_scale), (weight8, weight_scale) = to_fp8(x), to_fp8(weight)
        fp8 = functools.partial(torch._scaled_mm, out_dtype=torch.bfloat16, use_fast_accum=True)
        calls: dict[str, Callable[[], object]] = {
            "16 bits": functools.partial(F.linear, x, weight, bias),
            "fp8": functools.partial(fp8, x8, weight8.t(), x_scale, weight_scale.t(), bias=bias.bfloat16()),
            "with gelu": functools.partial(torch._addmm_activation, bias, x, weight.t(), use_gelu=True),
        }
        seconds = {kind: machine.seconds(call) for kind, call in calls.items()}
        found[name] = {"flop": 2 * rows * inputs * outputs, "seconds": seconds}
    return found


def rows(machine: Machine) -> dict[str, Any]:
    """The kernels between the products: seconds, and the bytes that they must read and write."""
    dit, window, length = machine.config.dit, machine.config.window, machine.tokens
    x, update, vector = machine.random(length, dit.dim), machine.random(length, dit.dim), machine.random(dit.dim)
    inner, qkv = machine.random(length, dit.ffn_dim), machine.random(length, 3 * dit.dim)
    keys = window.window * machine.config.tokens_per_frame
    cache = torch.zeros(2, dit.num_heads, keys, dit.head_dim, device=machine.device, dtype=machine.dtype)
    q = torch.empty(length, dit.num_heads, dit.head_dim, device=machine.device, dtype=machine.dtype).transpose(0, 1)
    angles = torch.ones(keys, dit.head_dim // 2, device=machine.device)
    some = angles[:length]
    place = machine.config.latent_height * 8, machine.config.latent_width * 8
    size = (1, machine.config.vae.base_dim, 12, *place)
    frames, added = (machine.random(*size).to(memory_format=torch.channels_last_3d) for _ in range(2))
    out, gains = torch.empty_like(frames), machine.random(size[1])
    calls: dict[str, tuple[Callable[[], object], float]] = {
        "residual and norm": (
            lambda: residual_norm(x, update, vector, vector, vector, eps=1e-6, one_plus=True), 4 * _bytes(x)),
        "rms norm": (lambda: rms_norm(x, vector, eps=1e-6), 2 * _bytes(x)),
        "quantize": (lambda: quantize_rows(x), _bytes(x) + x.numel()),
        "gelu": (lambda: gelu(inner), 2 * _bytes(inner)),
        "gelu to fp8": (lambda: gelu(inner, fp8=True), _bytes(inner) + inner.numel()),
        "norm, rotate, write": (
            lambda: norm_rotate_write(
                qkv, vector, vector, some, some, q, cache[0], cache[1], first_row=0, eps=1e-6, rotate_keys=True
            ),
            2 * _bytes(qkv),
        ),
        "rotate keys": (lambda: rotate_keys(cache[0], angles, angles, cache[1]), 2 * _bytes(cache[0])),
        "norm and silu": (lambda: norm_silu(frames, gains, out), 2 * _bytes(frames)),
        "sums, norm and silu": (
            lambda: norm_silu(frames, gains, out, bias=gains, added=added, keep=True), 4 * _bytes(frames)),
    }  # fmt: skip
    return {name: {"bytes": count, "seconds": machine.seconds(call)} for name, (call, count) in calls.items()}


def _bytes(tensor: Tensor) -> float:
    return float(tensor.numel() * tensor.element_size())


def convolutions(machine: Machine) -> dict[str, Any]:
    """Those of the VAE's residual blocks on a chunk: by cuDNN's own choice of 10 and of 32 plans, and in FP8."""
    vae, found = machine.config.vae, {}
    widths = [vae.base_dim * factor for factor in vae.dim_mult[::-1]]
    for doublings, width in enumerate(dict.fromkeys(widths)):
        place = [side << doublings for side in (machine.config.latent_height, machine.config.latent_width)]
        frames = 3 << min(doublings, 2)
        x = machine.random(1, width, frames + 2, *place).to(memory_format=torch.channels_last_3d)
        weight = machine.random(width, width, 3, 3, 3).to(memory_format=torch.channels_last_3d)
        seconds: dict[str, float | str] = {
            f"best of {limit}": machine.seconds(functools.partial(_convolve, x, weight, limit)) for limit in (10, 32)
        }
        seconds["fp8"] = _convolve_fp8(machine, x, width)
        flop = 2 * 27 * width * width * frames * place[0] * place[1]
        found[f"{width} channels, {frames} frames, {place[0]}x{place[1]}"] = {"flop": flop, "seconds": seconds}
    return found


def _convolve(x: Tensor, weight: Tensor, limit: int) -> Tensor:
    with torch.backends.cudnn.flags(enabled=True, benchmark=True, benchmark_limit=limit):
        return F.conv3d(x, weight, padding=(0, 1, 1))


def _convolve_fp8(machine: Machine, x: Tensor, width: int) -> float | str:
    from longlive_serve.backends.fused.cudnn_convolution import CudnnConvolution
    from longlive_serve.models.vae.decoder import CausalConv3d, RMSNorm
    from longlive_serve.models.vae.fused_decoder import FP8Weights

    try:
        convolve = CudnnConvolution()
        conv = CausalConv3d(width, width).to(machine.device, machine.dtype)
        weights = FP8Weights.take(RMSNorm(width).to(machine.device), conv)
        small = x.clamp(-4, 4).to(torch.float8_e4m3fn).contiguous(memory_format=torch.channels_last_3d)
        return machine.seconds(lambda: convolve(small, weights, torch.bfloat16, None))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def profile(call: Callable[[], object], device: str) -> dict[str, Any]:
    """What kernels of a call take, beside its time on the wall: the rest are gaps. The fifteen longest by name."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    on_cuda = device.startswith("cuda")
    wall = seconds_of(call, device, 5)["median"]
    with recording(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
        call()
        if on_cuda:
            torch.cuda.synchronize()
    kind = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = sorted(((getattr(row, kind) / 1e6, row.count, row.key) for row in recorded.key_averages()), reverse=True)
    longest = [{"name": name, "count": count, "seconds": seconds} for seconds, count, name in rows]
    return {
        "wall_s": wall,
        "kernels_s": sum(seconds for seconds, _, _ in rows),
        "launches": sum(count for _, count, _ in rows),
        "longest": list(itertools.islice(longest, 15)),
    }
