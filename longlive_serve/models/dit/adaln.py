# SPDX-License-Identifier: Apache-2.0
"""AdaLN modulation of the causal DiT at given noise levels, as constants.

Used where the few noise levels are known in advance: by the fused backend and by the simulation of its FP8.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longlive_serve.models.dit.causal_dit import CausalDiT, time_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class Modulation:
    """Modulation of every block and of the head at one noise level, which all frames of a forward share."""

    blocks: Tensor
    """[layers, 6, D]: shift, scale, gate of self-attention, then of the FFN."""
    head: Tensor
    """[2, D]: shift, scale."""


def modulation(model: CausalDiT, timestep: Tensor) -> Modulation:
    """The model's modulation at `timestep` (a 0-dim tensor)."""
    features = time_features(timestep, model.config.freq_dim).to(model.patch_embedding.weight.dtype)
    time = model.time_embedding(features)
    shared = model.time_projection(time).unflatten(-1, (6, -1))
    blocks = torch.cat([block.modulation for block in model.blocks]) + shared
    return Modulation(blocks=blocks, head=model.head.modulation[0] + time)
