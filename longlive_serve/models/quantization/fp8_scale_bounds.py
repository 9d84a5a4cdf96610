# SPDX-License-Identifier: Apache-2.0
"""Scales of FP8 (E4M3) numbers that no input makes too large, from the weights alone: nothing is calibrated.

Called by the fused backend, and by what simulates its FP8. Such bounds are some ten times what usual inputs come to,
which costs E4M3 nothing: it is equally fine over 15 binades.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longlive_serve.models.dit.adaln import Modulation
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8
from longlive_serve.models.vae.decoder import RMSNorm


def silu_scale(norm: RMSNorm) -> Tensor:
    """Of what comes out of a norm of the VAE and its SiLU: float32 []. A normed position has length sqrt(C) before the
    gains, and SiLU makes nothing larger."""
    scale: Tensor = norm.gamma.float().abs().max() * norm.scale / LARGEST_FP8
    return scale


def attention_scales(model: CausalDiT, levels: Sequence[Modulation]) -> Tensor:
    """Of the queries, keys and values of self-attention at any of these noise levels: float32 [layers, 3]."""
    modulations = torch.stack([level.blocks for level in levels]).float()  # [levels, layers, 6, D]
    bounds = [
        (_largest_normed(block.self_attn.norm_q.weight), _largest_normed(block.self_attn.norm_k.weight), value)
        for block, value in zip(model.blocks, _largest_values(model, modulations), strict=True)
    ]
    return torch.stack([torch.stack(layer) for layer in bounds]) / LARGEST_FP8


def _largest_normed(weight: Tensor) -> Tensor:
    """A token's RMS norm has length sqrt(D), and RoPE turns pairs: no number of a pair is longer than the pair."""
    largest: Tensor = weight.float().abs().max() * math.sqrt(len(weight))
    return largest


def _largest_values(model: CausalDiT, modulations: Tensor) -> list[Tensor]:
    """|w x + b| <= |w| |x| + |b|, where x is a token after LayerNorm, of length sqrt(D) at most, and modulation."""
    shift, scale = modulations[:, :, 0], modulations[:, :, 1]  # [levels, layers, D]
    lengths = math.sqrt(shift.shape[-1]) * (1 + scale).abs().amax(-1) + shift.norm(dim=-1)
    layers = [block.self_attn.v for block in model.blocks]
    return [
        (layer.weight.float().norm(dim=1) * length + layer.bias.float().abs()).max()
        for layer, length in zip(layers, lengths.amax(0), strict=True)
    ]
