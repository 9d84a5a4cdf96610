# SPDX-License-Identifier: Apache-2.0
"""Quantization recipes: the 8-bit format of each layer, or the reason why it keeps 16 bits.

Used by calibration, checkpoint writer and evaluation. Layer names are those of `longlive_serve.models`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import nn

from longlive_serve.config.presets import DIT, TEXT_ENCODER, VAE_DECODER
from longlive_serve.models.vae.decoder import CausalConv3d


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """The quantization of a layer."""

    dtype: torch.dtype
    """Dtype of quantized weights and inputs: int8 or float8_e4m3fn."""
    inputs: bool = True
    """Quantize the inputs too, with one calibrated scale per layer."""
    smoothing: float | None = None
    """SmoothQuant's alpha: how far to move outliers of the inputs to the weights; None: no SmoothQuant."""

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        smooth = f" SmoothQuant {self.smoothing}" if self.smoothing is not None else ""
        return f"{name} {'W8A8' if self.inputs else 'weights only'}{smooth}"


Recipe = Mapping[str, Format]
"""The format per quantized model; other models are not changed."""

RECIPES: dict[str, Recipe] = {
    "int8": {
        DIT: Format(dtype=torch.int8, smoothing=0.5),
        TEXT_ENCODER: Format(dtype=torch.int8, inputs=False),
    },
    "fp8": {
        DIT: Format(dtype=torch.float8_e4m3fn),
        TEXT_ENCODER: Format(dtype=torch.float8_e4m3fn, inputs=False),
    },
    "int8-vae": {VAE_DECODER: Format(dtype=torch.int8)},
}

WEIGHTS_ONLY = {DIT: ("blocks.*.cross_attn.[kv]",)}  # run once per prompt: 8-bit inputs would save no time

UNQUANTIZED_LAYERS: dict[str, dict[str, str]] = {
    DIT: {
        "patch_embedding": "reads the noisy latents, 0.01 % of all weights",
        "text_embedding.*": "runs once per prompt, and every layer reads its output",
        "time_embedding.*": "its error would shift the noise level",
        "time_projection.*": "computes the scales and gates of every layer; one row per frame, not per token",
        "head.head": "computes the flow, 0.01 % of all weights",
    },
    TEXT_ENCODER: {
        "stack.embed_tokens": "a table that is read, not multiplied",
        "*.relative_attention_bias": "a table that is read, not multiplied",
    },
    VAE_DECODER: {
        "conv2": "reads the latents, a 1x1 convolution",
        "decoder.conv1": "reads the latents",
        "decoder.middle.1.*": "attention at the lowest resolution, few FLOPs",
        "*.shortcut": "a 1x1 convolution around a block, few FLOPs",
        "decoder.head.2": "computes the pixels",
    },
}
"""Layers that keep 16 bits, by pattern, and why. All others are quantized."""

QUANTIZABLE = (nn.Linear, nn.Conv2d, CausalConv3d)


def combine_recipes(names: Iterable[str]) -> Recipe:
    """Merge recipes. Raises ValueError for an unknown recipe, or two for the same model."""
    formats: dict[str, Format] = {}
    for name in names:
        if name not in RECIPES:
            raise ValueError(f"recipe: got {name!r}, expected some of {list(RECIPES)}")
        if twice := sorted(formats.keys() & RECIPES[name].keys()):
            raise ValueError(f"recipe: got two for {', '.join(twice)} ({' '.join(names)}), expected one per model")
        formats |= RECIPES[name]
    return formats


def owner(model: str, names: Iterable[str]) -> str:
    """The recipe among `names` that quantizes `model`."""
    return next(name for name in names if model in RECIPES[name])


def formats_of_layers(name: str, model: nn.Module, format: Format) -> tuple[dict[str, Format], dict[str, str]]:
    """The formats of the quantized layers of `model` (called `name`), and the reasons for the other layers."""
    quantized, skipped = {}, {}
    for layer, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() < 2:
            continue
        reason = next(
            (reason for pattern, reason in UNQUANTIZED_LAYERS[name].items() if fnmatchcase(layer, pattern)), None
        )
        if reason is not None:
            skipped[layer] = reason
            continue
        assert isinstance(module, QUANTIZABLE), (
            f"{name}: {layer} is a {type(module).__name__}: it needs a row in UNQUANTIZED_LAYERS"
        )
        weights_only = any(fnmatchcase(layer, pattern) for pattern in WEIGHTS_ONLY.get(name, ()))
        quantized[layer] = dataclasses.replace(format, inputs=False, smoothing=None) if weights_only else format
    return quantized, skipped
