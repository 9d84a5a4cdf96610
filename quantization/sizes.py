# SPDX-License-Identifier: Apache-2.0
"""Sizes of checkpoints: of a folder, and of the full-size models with random weights.

Called by `evaluate`. Sizes do not depend on values, so the full size needs no published weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longlive_serve.config.presets import DIT, MODELS, PRESETS, ModelConfig
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.weights.loader import ModelLoader
from quantization.checkpoint import InputStats, quantized_state, write
from quantization.recipes import Format, formats_of_layers

FULL_SIZE = "longlive-1.3b"


def bytes_of(state: Mapping[str, Tensor]) -> int:
    """Total bytes of all tensors."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.values())


def sizes(config: ModelConfig, weights: str) -> dict[str, dict[str, int]]:
    """Bytes of every model's tensors: in its file, and in memory in bfloat16."""
    loader = ModelLoader.open(config, weights)
    checkpoints = {name: checkpoint for name in MODELS if (checkpoint := loader.checkpoint(name)) is not None}
    in_memory = {name: loader.load_model(name, "cpu", torch.bfloat16).state_dict() for name in MODELS}
    return {
        "bytes_on_disk": {name: bytes_of(checkpoint.state()) for name, checkpoint in checkpoints.items()},
        "bytes_in_memory": {name: bytes_of(state) for name, state in in_memory.items()},
    }


def full_size_bytes(name: str, formats: Mapping[str, Format], folder: Path) -> dict[str, int]:
    """Bytes of the full-size checkpoint of the DiT or the VAE decoder: in bfloat16, and by recipe.

    The DiT temporarily takes 5 GB of memory and of disk.
    """
    sizes = PRESETS[FULL_SIZE]
    with torch.device("meta"):
        model: nn.Module = CausalDiT(sizes.dit) if name == DIT else VAEDecoder(sizes.vae)
    plain = folder / f"{name}.safetensors"
    write(plain, {key: torch.randn(t.shape, dtype=torch.bfloat16) for key, t in model.state_dict().items()}, {})
    num_bytes = {"bfloat16": plain.stat().st_size}
    for recipe, format in formats.items():
        layers, _ = formats_of_layers(name, model, format)
        state = load_file(plain)
        input_stats = {layer: _dummy_stats(state[f"{layer}.weight"], one) for layer, one in layers.items()}
        path = folder / f"{name}.{recipe}.safetensors"
        write(path, quantized_state(state, layers, input_stats), {})
        num_bytes[recipe] = path.stat().st_size
        path.unlink()
    plain.unlink()
    return num_bytes


def _dummy_stats(weight: Tensor, format: Format) -> InputStats:
    ones = torch.ones(weight.shape[1])
    return InputStats(amax=ones, smoothing=ones if format.smoothing is not None else None)
