# SPDX-License-Identifier: Apache-2.0
"""Models with random weights, created directly on their device: no checkpoint and no float32 copy on the CPU.

Speed does not depend on the values of the weights, as long as they are not zero and nothing overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from longlive_serve.config.presets import DIT, TEXT_ENCODER, TINY_DECODER, VAE_DECODER, ModelConfig
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.models.vae.tiny_decoder import TinyDecoder
from longlive_serve.weights.loader import ModelLoader

KINDS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    TEXT_ENCODER: lambda config: TextEncoder(config.text_encoder),
    DIT: lambda config: CausalDiT(config.dit),
    VAE_DECODER: lambda config: VAEDecoder(config.vae),
    TINY_DECODER: lambda config: TinyDecoder(config.tiny_decoder),
}
NEAR = 0.02  # standard deviation of biases around 0 and of the weights of norms around 1


class RandomModelLoader(ModelLoader):
    """Loads random models; ignores the `weights` setting."""

    def load_model(self, name: str, device: str, dtype: torch.dtype) -> Any:
        return random_model(name, self.config, device, dtype)


def random_model(name: str, config: ModelConfig, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """Like `ModelLoader.load_model`, but with random weights, drawn on the device in `dtype`.

    The same seed gives the same weights on the same device.
    """
    with torch.device("meta"):
        model = KINDS[name](config)
    generator = torch.Generator(device).manual_seed(seed)
    for module in model.modules():
        for key, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            setattr(module, key, nn.Parameter(_fill(values, key, generator), requires_grad=False))
        for key, buffer in list(module.named_buffers(recurse=False)):  # constants, set by the models
            assert not buffer.is_meta, f"{name}: the buffer {key} has no values"
            setattr(module, key, buffer.to(device, dtype))
    return model.eval()


def _fill(values: Tensor, key: str, generator: torch.Generator) -> Tensor:
    """Normal values: norm weights near 1, biases near 0, other weights scaled by 1/sqrt(fan-in)."""
    if key == "gamma" or (key == "weight" and values.dim() == 1):
        return values.normal_(1.0, NEAR, generator=generator)
    deviation = NEAR if values.dim() == 1 else 1 / math.sqrt(values[0].numel())
    return values.normal_(0.0, deviation, generator=generator)
