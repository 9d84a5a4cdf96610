# SPDX-License-Identifier: Apache-2.0
"""Models with only the first layers of the DiT: the layers are alike, and exporting each takes seconds."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from export.to_onnx import Source
from longlive_serve.models.dit.causal_dit import CausalDiT


def shallow(source: Source, layers: int) -> Source:
    """`source` with only the first `layers` layers of its DiT."""

    def load(name: str, dtype: torch.dtype) -> nn.Module:
        model = source.load(name, dtype)
        if isinstance(model, CausalDiT):
            model.blocks = model.blocks[:layers]
        return model

    sizes = dataclasses.replace(source.sizes, dit=dataclasses.replace(source.sizes.dit, num_layers=layers))
    return dataclasses.replace(source, sizes=sizes, load=load)
