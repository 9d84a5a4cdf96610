# SPDX-License-Identifier: Apache-2.0
"""Simulates the fused backend's `fp8`, `fp8_attention` and `fp8_decoder` in plain PyTorch, without a GPU.

Used by `evaluate`. A test compares it with the backend's kernels in Triton's interpreter.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.backends.torch_backend import TorchDiT, TorchVAEDecoder
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.models.dit.adaln import modulation
from longlive_serve.models.dit.causal_dit import Attention
from longlive_serve.models.quantization.fp8_scale_bounds import attention_scales, silu_scale
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8, to_8_bit
from longlive_serve.models.vae.decoder import CausalConv3d, ResidualBlock

FP8 = torch.float8_e4m3fn


class DynamicFP8Linear(nn.Module):
    """A linear layer with dynamic input scales per token and weight scales per output channel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(rounded_by_rows(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_by_rows(x), self.weight, self.bias)


def rounded_by_rows(x: Tensor) -> Tensor:
    """Round x [.., N] to FP8 (E4M3), with a scale per row that maps its largest absolute value to LARGEST_FP8."""
    return rounded(x, x.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FP8)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Round x to FP8 (E4M3) with the given scale."""
    return (to_8_bit(x, scale, FP8).float() * scale).to(x.dtype)


def simulate(runner: ModelRunner) -> None:
    """Simulate `fp8`: quantize the linear layers in the blocks, except those for the prompt's keys and values."""
    dit = runner.backends.dit
    assert isinstance(dit, TorchDiT)
    for number, block in enumerate(dit.model.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and name not in ("cross_attn.k", "cross_attn.v"):
                dit.model.set_submodule(f"blocks.{number}.{name}", DynamicFP8Linear(layer))


def simulate_attention(runner: ModelRunner) -> None:
    """Simulate `fp8` and `fp8_attention`, for the base variant."""
    dit = runner.backends.dit
    assert isinstance(dit, TorchDiT)
    levels = [*dit.timesteps, dit.clean_timestep]
    with torch.no_grad():
        scales = attention_scales(dit.model, [modulation(dit.model, level) for level in levels])
    simulate(runner)
    for block, of_layer in zip(dit.model.blocks, scales, strict=True):
        attention: Attention = block.self_attn
        attention.attend = functools.partial(_attend, attention, of_layer)  # type: ignore[method-assign]


def _attend(attention: Attention, scales: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Like `Attention.attend`. The softmax weights are rounded with the scale 1/448, the result with that of v."""
    assert mask is None, "a mask is used in training only"
    q, k, v = (rounded(x, scale) for x, scale in zip((q, k, v), scales, strict=True))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    out = rounded(rounded(weights, 1 / torch.tensor(LARGEST_FP8)) @ v / total, scales[2])
    product = attention.o  # its input is already FP8
    return F.linear(out.transpose(1, 2).flatten(2), product.weight, product.bias)


def simulate_decoder(runner: ModelRunner) -> None:
    """Simulate `fp8_decoder`: quantize the convolutions of the residual blocks, nearly all of the Wan VAE's FLOPs."""
    decoder = runner.backends.vae_decoder
    assert isinstance(decoder, TorchVAEDecoder)
    for block in decoder.model.modules():
        if isinstance(block, ResidualBlock):
            for norm, conv in block.normed_convolutions():
                weight = rounded_by_rows(conv.weight.detach().flatten(1)).view_as(conv.weight)
                conv.weight = nn.Parameter(weight, requires_grad=False)
                conv.convolve = functools.partial(_convolve, conv, silu_scale(norm))  # type: ignore[method-assign]


def _convolve(conv: CausalConv3d, scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return CausalConv3d.convolve(conv, rounded(x, scale), weight)
