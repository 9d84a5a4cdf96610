# SPDX-License-Identifier: Apache-2.0
"""The models with flat inputs and outputs, in the order of `graph_io`, for `to_onnx`.

They compute the same as the models; only the write to the KV cache becomes an ONNX operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longlive_serve.backends.exported.io_spec import (
    BATCH,
    FRAMES,
    PROMPT_KV,
    USED,
    VAE_OPENING,
    VAE_STEADY,
    GraphIO,
    graph_io,
)
from longlive_serve.config.presets import DIT, TEXT_ENCODER, ModelConfig
from longlive_serve.models.dit.causal_dit import CausalDiT, time_features
from longlive_serve.models.dit.rope import rotate
from longlive_serve.models.quantization.int8_fp8_layers import QuantizedLayer
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.models.vae.decoder import VAEDecoder

OPSETS = {DIT: 24}  # TensorScatter
DEFAULT_OPSET = 20  # before Attention: TensorRT has no kernel for one head as wide as the VAE's


class PromptKVGraph(nn.Module):
    """The text MLP and the cross-attention keys and values of all layers."""

    def __init__(self, model: CausalDiT) -> None:
        super().__init__()
        self.model = model

    def forward(self, embeds: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.embed_prompt(embeds)


class DiTGraph(nn.Module):
    """A denoising step, a KV-cache update or a recache."""

    def __init__(self, model: CausalDiT, relative: bool) -> None:
        super().__init__()
        self.model, self.relative = model, relative

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        latents, time_features, prompt_keys, prompt_values, *angles = inputs[: 7 + self.relative]
        write_index, *cache = inputs[7 + self.relative :]
        view = ScatteredCache(cache, angles, write_index)
        flow = self.model.run(latents, time_features, (prompt_keys, prompt_values), view)
        assert flow is not None
        return flow, *view.new_keys, *view.new_values


class ScatteredCache:
    """The KV cache in a graph: every layer's rows are an input, are updated at `write_index` and are an output."""

    mask: Tensor | None = None

    def __init__(self, cache: Sequence[Tensor], angles: Sequence[Tensor], write_index: Tensor) -> None:
        """angles: cosines and sines of the queries; then those of the keys in use, or `window` of their frames."""
        layers = len(cache) // 2
        self.keys, self.values = cache[:layers], cache[layers:]
        self.write_index = write_index
        cos, sin, *keys = angles
        self.query_angles = _of_heads(cos), _of_heads(sin)
        self.relative = len(keys) == 2
        self.key_angles = tuple(map(_of_heads, keys)) if self.relative else self.query_angles
        self.used = (keys[0].shape[1] if self.relative else keys[0].shape[0]) * cos.shape[2]
        self.new_keys: list[Tensor] = []
        self.new_values: list[Tensor] = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `CacheView.update`."""
        keys = write(self.keys[layer], k if self.relative else rotate(k, *self.key_angles), self.write_index)
        values = write(self.values[layer], v, self.write_index)
        self.new_keys.append(keys)
        self.new_values.append(values)
        in_use = keys[:, :, : self.used]
        return rotate(in_use, *self.key_angles) if self.relative else in_use, values[:, :, : self.used]


def _of_heads(angles: Tensor) -> Tensor:
    """[B, frames, positions, pairs] -> [B, 1, tokens, pairs], broadcast over heads."""
    return angles.flatten(1, 2).unsqueeze(1)


def write(cache: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """A copy of cache [B, H, rows, d] with new [B, H, n, d] in the n rows from index [B] on."""
    if torch.compiler.is_exporting():
        inputs = (cache, new, index)
        where: dict[str, Any] = {"axis": -2, "mode": "linear"}
        return torch.onnx.ops.symbolic("TensorScatter", inputs, where, dtype=cache.dtype, shape=cache.shape, version=24)
    cache = cache.clone()
    for session, first in enumerate(index.tolist()):
        cache[session, :, first : first + new.shape[2]] = new[session]
    return cache


class VAEGraph(nn.Module):
    """One latent frame to video."""

    def __init__(self, model: VAEDecoder, is_first: bool) -> None:
        super().__init__()
        self.model, self.is_first = model, is_first

    def forward(self, latent: Tensor, *cache: Tensor) -> tuple[Tensor, ...]:
        video, new_cache = self.model.decode_latent(latent, cache, self.is_first)
        return video, *new_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportableGraph:
    """A model ready for the exporter."""

    io: GraphIO
    model: nn.Module
    config: ModelConfig

    @property
    def opset(self) -> int:
        return OPSETS.get(self.io.name, DEFAULT_OPSET)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @property
    def rounds(self) -> bool:
        """Whether it rounds activations to 8 bits."""
        layers = (layer for layer in self.model.modules() if isinstance(layer, QuantizedLayer))
        return any(layer.input_scale is not None for layer in layers)

    def example(self, batch: int, frames: int, used: int, seed: int = 0) -> dict[str, Tensor]:
        """Random inputs of these sizes; every session of the batch has its own write index."""
        generator = torch.Generator().manual_seed(seed)
        dims = {BATCH: batch, FRAMES: frames, USED: used}
        inputs = {}
        for tensor in self.io.inputs:
            shape = [dims[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
            inputs[tensor.name] = torch.randn(shape, generator=generator).to(tensor.torch_dtype(self.dtype))
        if self.io.name == TEXT_ENCODER:
            length = inputs["ids"].shape[1]
            inputs["ids"] = torch.randint(self.config.text_encoder.vocab_size, (batch, length), generator=generator)
            lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
            inputs["mask"] = (torch.arange(length) < lengths).long()
        if self.io.name == DIT:
            timesteps = 1000 * torch.rand((batch, frames), generator=generator)
            inputs["time_features"] = time_features(timesteps, self.config.dit.freq_dim).to(self.dtype)
            for name in [name for name in inputs if name.endswith("_cos")]:
                angles = 10 * inputs[name]
                inputs |= {name: angles.cos(), name.replace("_cos", "_sin"): angles.sin()}
            first = torch.randint(used - frames + 1, (batch,), generator=generator)
            inputs["write_index"] = first * self.config.tokens_per_frame
        return inputs


def exportable_graphs(model: nn.Module, config: ModelConfig, variant: str) -> list[ExportableGraph]:
    """The graphs of one of the three models. Converts the scales of its quantized layers to its dtype, in place."""
    graphs: dict[str, nn.Module]
    if isinstance(model, CausalDiT):
        graphs = {PROMPT_KV: PromptKVGraph(model), DIT: DiTGraph(model, variant == "infinity")}
    elif isinstance(model, VAEDecoder):
        graphs = {VAE_OPENING: VAEGraph(model, is_first=True), VAE_STEADY: VAEGraph(model, is_first=False)}
    else:
        assert isinstance(model, TextEncoder), type(model)
        graphs = {TEXT_ENCODER: model}
    dtype = next(model.parameters()).dtype
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            layer.hold_scales_in(dtype)
    table = graph_io(config, variant)
    return [ExportableGraph(io=table[name], model=graph, config=config) for name, graph in graphs.items()]
