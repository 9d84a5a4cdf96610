# SPDX-License-Identifier: Apache-2.0
"""What noise levels do to the causal DiT, as constants, and how large its queries, keys and values can become.

Called where there are few noise levels and they are known: by the fused engine, and by what simulates its FP8.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longlive_serve.models.causal_dit import CausalDiT, time_features

LARGEST_FP8 = 448.0  # of E4M3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modulation:
    """What a noise level does to every block and to the head: constants, as all frames of a forward share it."""

    blocks: Tensor
    """[layers, 6, D]: shift, scale, gate of self-attention, then of the FFN."""
    head: Tensor
    """[2, D]: shift, scale."""


def modulation(network: CausalDiT, timestep: Tensor) -> Modulation:
    """What the network does at `timestep` (a 0-dim tensor)."""
    features = time_features(timestep, network.config.freq_dim).to(network.patch_embedding.weight.dtype)
    time = network.time_embedding(features)
    shared = network.time_projection(time).unflatten(-1, (6, -1))
    blocks = torch.cat([block.modulation for block in network.blocks]) + shared
    return Modulation(blocks=blocks, head=network.head.modulation[0] + time)


def attention_scales(network: CausalDiT, levels: Sequence[Modulation]) -> Tensor:
    """What FP8 (E4M3) queries, keys and values of self-attention are multiples of: float32 [layers, 3].

    No input makes a number too large for them, so there is nothing to calibrate. Such bounds are some ten times what
    usual inputs come to, which costs E4M3 nothing: its 15 binades are equally fine.
    """
    modulations = torch.stack([level.blocks for level in levels]).float()  # [levels, layers, 6, D]
    bounds = [
        (_largest_normed(block.self_attn.norm_q.weight), _largest_normed(block.self_attn.norm_k.weight), value)
        for block, value in zip(network.blocks, _largest_values(network, modulations), strict=True)
    ]
    return torch.stack([torch.stack(layer) for layer in bounds]) / LARGEST_FP8


def _largest_normed(weight: Tensor) -> Tensor:
    """A token's RMS norm has length sqrt(D), and RoPE turns pairs: no number of a pair is longer than the pair."""
    largest: Tensor = weight.float().abs().max() * math.sqrt(len(weight))
    return largest


def _largest_values(network: CausalDiT, modulations: Tensor) -> list[Tensor]:
    """|w x + b| <= |w| |x| + |b|, where x is a token after LayerNorm, of length sqrt(D) at most, and modulation."""
    shift, scale = modulations[:, :, 0], modulations[:, :, 1]  # [levels, layers, D]
    lengths = math.sqrt(shift.shape[-1]) * (1 + scale).abs().amax(-1) + shift.norm(dim=-1)

    layers = [block.self_attn.v for block in network.blocks]
    return [
        (layer.weight.float().norm(dim=1) * length + layer.bias.float().abs()).max()
        for layer, length in zip(layers, lengths.amax(0), strict=True)
    ]
