# SPDX-License-Identifier: Apache-2.0
"""FP8 (E4M3) scales from upper bounds for any input, computed from the weights alone, without calibration.

Used by the fused backend and by the simulation of its FP8. The bounds are about ten times the usual values, which costs
no accuracy: the relative precision of E4M3 is constant over 15 binades.
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
    """Scale of the output of a VAE norm and its SiLU: float32 []. A normed position has length sqrt(C) before the
    gains, and SiLU does not increase magnitudes."""
    scale: Tensor = norm.gamma.float().abs().max() * norm.scale / LARGEST_FP8
    return scale


def attention_scales(model: CausalDiT, levels: Sequence[Modulation]) -> Tensor:
    """Scales of the queries, keys and values of self-attention, valid at all `levels`: float32 [layers, 3]."""
    modulations = torch.stack([level.blocks for level in levels]).float()  # [levels, layers, 6, D]
    bounds = [
        (_largest_normed(block.self_attn.norm_q.weight), _largest_normed(block.self_attn.norm_k.weight), value)
        for block, value in zip(model.blocks, _largest_values(model, modulations), strict=True)
    ]
    return torch.stack([torch.stack(layer) for layer in bounds]) / LARGEST_FP8


def _largest_normed(weight: Tensor) -> Tensor:
    """A normed token has length sqrt(D). RoPE rotates pairs, and the length of a pair bounds both its numbers."""
    largest: Tensor = weight.float().abs().max() * math.sqrt(len(weight))
    return largest


def _largest_values(model: CausalDiT, modulations: Tensor) -> list[Tensor]:
    """|w x + b| <= |w| |x| + |b|, where x is a token after LayerNorm (length at most sqrt(D)) and modulation."""
    shift, scale = modulations[:, :, 0], modulations[:, :, 1]  # [levels, layers, D]
    lengths = math.sqrt(shift.shape[-1]) * (1 + scale).abs().amax(-1) + shift.norm(dim=-1)
    layers = [block.self_attn.v for block in model.blocks]
    return [
        (layer.weight.float().norm(dim=1) * length + layer.bias.float().abs()).max()
        for layer, length in zip(layers, lengths.amax(0), strict=True)
    ]
