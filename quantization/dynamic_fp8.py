# SPDX-License-Identifier: Apache-2.0
"""What the fused backend computes with `fp8` and `fp8_attention`, in plain PyTorch: its kernels are made for a GPU.

Used by `evaluate`. A test holds it equal to the backend's own kernels in Triton's interpreter.
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
    """A linear layer whose inputs get a scale for every token as they come, and its weights one for every channel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(rounded_by_rows(layer.weight.detach()), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(rounded_by_rows(x), self.weight, self.bias)


def rounded_by_rows(x: Tensor) -> Tensor:
    """x [.., N] as FP8 (E4M3) holds it, each row with the scale that maps its largest number to the format's."""
    return rounded(x, x.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FP8)


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """x as multiples of `scale` that FP8 (E4M3) has."""
    return (to_8_bit(x, scale, FP8).float() * scale).to(x.dtype)


def simulate(runner: ModelRunner) -> None:
    """`fp8`: such layers where the fused backend has FP8 products: in the blocks, but not for prompts."""
    dit = runner.backends.dit
    assert isinstance(dit, TorchDiT)
    for number, block in enumerate(dit.model.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and name not in ("cross_attn.k", "cross_attn.v"):
                dit.model.set_submodule(f"blocks.{number}.{name}", DynamicFP8Linear(layer))


def simulate_attention(runner: ModelRunner) -> None:
    """`fp8` and `fp8_attention`, of the base variant."""
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
    """As `Attention.attend`. The softmax's weights are multiples of 1/448, the result of what the values are."""
    assert mask is None, "only training has a mask"
    q, k, v = (rounded(x, scale) for x, scale in zip((q, k, v), scales, strict=True))
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
    out = rounded(rounded(weights, 1 / torch.tensor(LARGEST_FP8)) @ v / total, scales[2])
    product = attention.o  # its input is FP8 already
    return F.linear(out.transpose(1, 2).flatten(2), product.weight, product.bias)


def simulate_decoder(runner: ModelRunner) -> None:
    """`fp8_decoder`: such convolutions in the residual blocks, which do nearly all of the Wan VAE's work."""
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
