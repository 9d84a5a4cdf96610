# SPDX-License-Identifier: Apache-2.0
"""Computes and writes a quantized checkpoint from weights and calibration statistics.

The file holds every tensor of the model under its name in this project, as `ModelLoader` expects.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from longlive_serve.models.quantization.int8_fp8_layers import scale_for, to_8_bit
from quantization.recipes import Format


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class InputStats:
    """Calibration statistics of a layer's inputs."""

    amax: Tensor
    """Largest absolute value, float32: [] over all, or with `smoothing` [in] per channel."""
    smoothing: Tensor | None = None
    """SmoothQuant: multiplier per channel, float32 [in]."""


def quantized_layer(weight: Tensor, format: Format, input_stats: InputStats | None) -> dict[str, Tensor]:
    """The tensors that replace `weight` [out, in, ...]: the parts of `int8_fp8_layers.STATE`."""
    weight, state = weight.float(), {}
    if format.inputs:
        assert input_stats is not None
        amax = input_stats.amax.float()
        if input_stats.smoothing is not None:
            smoothing = input_stats.smoothing.float().bfloat16().float()  # exact in every precision
            weight, amax = weight / smoothing, amax * smoothing
            state["smoothing"] = smoothing
        state["input_scale"] = scale_for(amax.max(), format.dtype)
    scale = scale_for(weight.flatten(1).abs().amax(1), format.dtype)
    per_row = scale.view(-1, *[1] * (weight.dim() - 1))
    return state | {"quantized_weight": to_8_bit(weight, per_row, format.dtype), "weight_scale": scale}


def quantized_state(
    state: Mapping[str, Tensor], formats: Mapping[str, Format], input_stats: Mapping[str, InputStats]
) -> dict[str, Tensor]:
    """The tensors of a quantized checkpoint: the layers of `formats` in 8 bits, all others in bfloat16."""
    made: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if key.endswith(".weight") and layer in formats:
            parts = quantized_layer(tensor, formats[layer], input_stats.get(layer))
            made |= {f"{layer}.{part}": value for part, value in parts.items()}
        else:
            made[key] = tensor.bfloat16()
    return made


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors to a .safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}, partial, dict(metadata))
    partial.chmod(0o644)  # safetensors creates it as 0600
    os.replace(partial, path)
