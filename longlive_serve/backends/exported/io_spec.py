# SPDX-License-Identifier: Apache-2.0
"""Inputs and outputs of every exported graph: names, dtypes, shapes. This is their only definition.

Read by the export, by the backends that run graphs and by their tests. A dim is a number, or the name of a dynamic dim.

The KV cache: every layer's keys and values are an input of fixed length and an output at the same address, which the
graph writes in place at `write_index` (ONNX TensorScatter, linear; TensorRT's KV-cache update). A slot of the cache is
a whole number of chunks, so a write never wraps. `README.md` of `export/` gives the reasons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from longlive_serve.config.presets import DIT, TEXT_ENCODER, VAE_DECODER, ModelConfig
from longlive_serve.models.vae.decoder import VAEDecoder

PROMPT_KV, VAE_OPENING, VAE_STEADY = "prompt_kv", "vae_opening", "vae_steady"
GRAPHS_OF = {TEXT_ENCODER: (TEXT_ENCODER,), DIT: (PROMPT_KV, DIT), VAE_DECODER: (VAE_OPENING, VAE_STEADY)}
"""The graphs of every model."""

BATCH, FRAMES, USED = "batch", "frames", "used"  # sessions; latent frames in the forward; frames attended to
WEIGHTS, FLOAT32, INT64 = "weights", "float32", "int64"  # dtypes; `weights` is the dtype of the graph's weights


@dataclasses.dataclass(frozen=True)
class GraphTensor:
    """One input or output."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str = WEIGHTS

    def torch_dtype(self, weights: torch.dtype) -> torch.dtype:
        dtype: torch.dtype = weights if self.dtype == WEIGHTS else getattr(torch, self.dtype)
        return dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphIO:
    """All inputs and outputs of a graph, in order."""

    name: str
    inputs: tuple[GraphTensor, ...]
    outputs: tuple[GraphTensor, ...]
    in_place: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Output -> the input whose memory it overwrites."""
    persistent: tuple[str, ...] = ()
    """Inputs with fixed addresses: the tensors of a slot."""

    def dims(self, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """The sizes of the named dims in this call. Raises ValueError for a missing tensor or a wrong shape."""
        dims: dict[str, int] = {}
        for tensor in self.inputs:
            got = tuple(inputs[tensor.name].shape) if tensor.name in inputs else None
            if got is not None and len(got) == len(tensor.shape):
                dims |= {dim: size for dim, size in zip(tensor.shape, got, strict=True) if isinstance(dim, str)}
            if got != tuple(dims.get(dim) if isinstance(dim, str) else dim for dim in tensor.shape):
                raise ValueError(f"graph {self.name}: {tensor.name}: got {got}, expected {tensor.shape} with {dims}")
        return dims


def graph_io(config: ModelConfig, variant: str) -> dict[str, GraphIO]:
    """Every graph of a LongLive of these sizes, by name."""
    dit = config.dit
    tokens = (BATCH, dit.text_len)
    embeds = GraphTensor("embeds", (*tokens, dit.text_dim))
    heads = (dit.num_layers, BATCH, dit.num_heads, dit.text_len, dit.head_dim)
    prompt_kv = GraphTensor("prompt_keys", heads), GraphTensor("prompt_values", heads)
    return {
        TEXT_ENCODER: GraphIO(
            name=TEXT_ENCODER,
            inputs=(GraphTensor("ids", tokens, INT64), GraphTensor("mask", tokens, INT64)),
            outputs=(embeds,),
        ),
        PROMPT_KV: GraphIO(name=PROMPT_KV, inputs=(embeds,), outputs=prompt_kv),
        DIT: _dit_io(config, variant, prompt_kv),
        VAE_OPENING: _vae_io(config, VAE_OPENING, frames=1),
        VAE_STEADY: _vae_io(config, VAE_STEADY, frames=4),
    }


def _dit_io(config: ModelConfig, variant: str, prompt_kv: tuple[GraphTensor, ...]) -> GraphIO:
    """One graph for denoising steps, KV-cache updates and recaches: they differ only in the number of frames."""
    dit, positions = config.dit, config.tokens_per_frame
    latent_shape = (dit.channels, config.latent_height, config.latent_width)
    angles = (positions, dit.head_dim // 2)
    rows = (BATCH, dit.num_heads, config.window.window * positions, dit.head_dim)
    names = cache_names(dit.num_layers)
    if variant == "infinity":  # keys are cached without RoPE, and those attended to are rotated in every call
        window = tuple(GraphTensor(name, (BATCH, USED, *angles), FLOAT32) for name in ("key_cos", "key_sin"))
    else:
        window = (GraphTensor("window", (USED,), FLOAT32),)  # only its length is used
    return GraphIO(
        name=DIT,
        inputs=(
            GraphTensor("latents", (BATCH, FRAMES, *latent_shape)),
            GraphTensor("time_features", (BATCH, FRAMES, dit.freq_dim)),
            *prompt_kv,
            *(GraphTensor(name, (BATCH, FRAMES, *angles), FLOAT32) for name in ("query_cos", "query_sin")),
            *window,
            GraphTensor("write_index", (BATCH,), INT64),
            *(GraphTensor(name, rows) for name in names),
        ),
        outputs=(
            GraphTensor("flow", (BATCH, FRAMES, *latent_shape)),
            *(GraphTensor(f"new_{name}", rows) for name in names),
        ),
        in_place={f"new_{name}": name for name in names},
        persistent=tuple(names),
    )


def cache_names(layers: int) -> list[str]:
    """The inputs that hold the KV cache."""
    return [f"{kind}.{layer}" for kind in ("keys", "values") for layer in range(layers)]


def _vae_io(config: ModelConfig, name: str, frames: int) -> GraphIO:
    """One latent frame per call: it is enough work for a GPU, and partial chunks need it."""
    with torch.device("meta"):
        size = (config.latent_height, config.latent_width)
        shapes = [cache.shape[1:] for cache in VAEDecoder(config.vae).initial_cache(1, *size, "meta", torch.float32)]
    cache = [GraphTensor(f"cache.{index}", (BATCH, *shape)) for index, shape in enumerate(shapes)]
    return GraphIO(
        name=name,
        inputs=(GraphTensor("latent", (BATCH, config.vae.z_dim, *size)), *cache),
        outputs=(
            GraphTensor("video", (BATCH, frames, 3, *config.video_size)),
            *(dataclasses.replace(tensor, name=f"new_{tensor.name}") for tensor in cache),
        ),
    )
