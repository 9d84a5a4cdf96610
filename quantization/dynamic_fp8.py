# SPDX-License-Identifier: Apache-2.0
"""What the fused engine computes with `fp8`, in plain PyTorch: its kernels are made for a GPU.

Used by `evaluate`. A test holds it equal to the engine's own kernels in Triton's interpreter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.engines.torch_engine import TorchDiT
from longlive_serve.models.quantized import LARGEST
from longlive_serve.pipeline import Pipeline

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
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(torch.finfo(torch.float32).tiny) / LARGEST[FP8]
    return ((x / scale).to(FP8).float() * scale).to(x.dtype)


def simulate(pipeline: Pipeline) -> None:
    """Such layers where the fused engine multiplies in FP8: all of the blocks but the prompt's keys and values."""
    dit = pipeline.engines.dit
    assert isinstance(dit, TorchDiT)
    for number, block in enumerate(dit.network.blocks):
        for name, layer in list(block.named_modules()):
            if isinstance(layer, nn.Linear) and name not in ("cross_attn.k", "cross_attn.v"):
                dit.network.set_submodule(f"blocks.{number}.{name}", DynamicFP8Linear(layer))
