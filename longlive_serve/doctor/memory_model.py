# SPDX-License-Identifier: Apache-2.0
"""Memory that LongLive needs: parameters of the models, bytes of a session, sessions that fit. Pure Python.

Used by the doctor and by `deploy.capacity`. It counts what `models/` builds; tests compare the two.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from longlive_serve.config.presets import (
    DIT,
    TEXT_ENCODER,
    TINY,
    TINY_DECODER,
    VAE_DECODER,
    WAN,
    DiTConfig,
    ModelConfig,
    TextEncoderConfig,
    TinyDecoderConfig,
    VAEConfig,
)

GIB = 2**30
BYTES_OF = {"float32": 4, "float16": 2, "bfloat16": 2}
CUDA_CONTEXT = GIB  # of CUDA and its libraries in a process, rounded up
NUM_WIDE_TENSORS = {WAN: 5, TINY: 3}  # a decoder's largest tensors that exist at the same time, rounded up


def dit_parameters(config: DiTConfig) -> int:
    dim, ffn = config.dim, config.ffn_dim
    attention = 4 * _linear(dim, dim) + 2 * dim  # with the norms of q and k
    block = 2 * attention + 2 * dim + _linear(dim, ffn) + _linear(ffn, dim) + 6 * dim
    patch = 4 * config.channels  # values of 2x2 latent pixels
    text = _linear(config.text_dim, dim) + _linear(dim, dim)
    time = _linear(config.freq_dim, dim) + _linear(dim, dim) + _linear(dim, 6 * dim)
    return config.num_layers * block + _linear(patch, dim) + text + time + _linear(dim, patch) + 2 * dim


def text_encoder_parameters(config: TextEncoderConfig) -> int:
    dim, inner = config.dim, config.num_heads * config.head_dim
    layer = 4 * dim * inner + config.num_buckets * config.num_heads + 3 * dim * config.ffn_dim + 2 * dim
    return config.vocab_size * dim + config.num_layers * layer + dim


def vae_decoder_parameters(config: VAEConfig) -> int:
    layers = list(_vae_layers(config))
    dim = layers[0].outputs
    count = _linear(config.z_dim, config.z_dim) + sum(layer.parameters for layer in layers)
    return count + dim + _linear(dim, 3 * dim) + _linear(dim, dim)  # the attention


def tiny_decoder_parameters(config: TinyDecoderConfig) -> int:
    count = 9 * config.z_dim * config.channels[0] + config.channels[0] + 27 * config.channels[-1] + 3
    for (channels, outputs), frames in zip(itertools.pairwise(config.channels), (1, 2, 2), strict=True):
        memory_block = 9 * 4 * channels**2 + 3 * channels
        count += 3 * memory_block + frames * channels**2 + 9 * channels * outputs
    return count


def num_parameters(config: ModelConfig, model: str) -> int:
    if model == DIT:
        return dit_parameters(config.dit)
    if model == TEXT_ENCODER:
        return text_encoder_parameters(config.text_encoder)
    if model == TINY_DECODER:
        return tiny_decoder_parameters(config.tiny_decoder)
    return vae_decoder_parameters(config.vae)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionMemory:
    """Bytes of one session with a full window."""

    kv_slot: int
    """Its slot of the KV cache. All slots are allocated when the server starts."""
    prompt_kv: int
    """Keys and values of its prompt; the fused backend may need less."""
    decoder_cache: int
    latents: int
    """The clean latents of window and sink."""

    @property
    def total(self) -> int:
        return self.kv_slot + self.prompt_kv + self.decoder_cache + self.latents


def session_memory(
    config: ModelConfig,
    dtype: str,
    decoder: str = WAN,
    *,
    fp8_attention: bool = False,
    fp8_decoder: bool = False,
) -> SessionMemory:
    size, dit, window = BYTES_OF[dtype], config.dit, config.window
    row = 2 * dit.num_layers * dit.dim  # elements: a key and a value in each layer
    frame = dit.channels * config.latent_height * config.latent_width
    return SessionMemory(
        kv_slot=window.window * config.tokens_per_frame * row * (1 if fp8_attention else size),
        prompt_kv=dit.text_len * row * size,
        decoder_cache=decoder_cache_bytes(config, decoder, size, fp8_decoder),
        latents=(window.window + window.sink) * frame * size,
    )


def decoder_cache_bytes(config: ModelConfig, decoder: str, size: int, fp8: bool = False) -> int:
    """`size`: bytes of an element; with `fp8` the residual blocks have one byte."""
    if decoder == TINY:
        channels = config.tiny_decoder.channels[:-1]
        pixel = sum(3 * num_channels * size << 2 * stage for stage, num_channels in enumerate(channels))
    else:
        pixel = sum(
            2 * sum(layer.cached) * layer.scale**2 * (1 if fp8 and layer.is_residual else size)
            for layer in _vae_layers(config.vae)
        )
    return pixel * config.latent_height * config.latent_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """Bytes of a server on its device."""

    models: dict[str, int]
    workspace: int
    """Temporary tensors of a chunk and a recache: an estimate, rounded up."""
    session: SessionMemory

    def total(self, sessions: int) -> int:
        return sum(self.models.values()) + self.workspace + sessions * self.session.total

    def max_sessions(self, memory: int) -> int:
        return max(0, (memory - self.total(0)) // self.session.total)


def server_memory(
    config: ModelConfig,
    *,
    dtype: str,
    decoder: str = WAN,
    fused_dit: bool = False,
    fused_decoder: bool = False,
    fp8: bool = False,
    fp8_attention: bool = False,
    fp8_decoder: bool = False,
    on_cuda: bool = True,
) -> ServerMemory:
    """For models in PyTorch. The own workspace of graphs and engines is not counted."""
    size = BYTES_OF[dtype]
    decoder_model = TINY_DECODER if decoder == TINY else VAE_DECODER
    models = {model: size * num_parameters(config, model) for model in (TEXT_ENCODER, DIT, decoder_model)}
    if fp8:
        models[DIT] -= _fp8_savings(config.dit, size)
    if fp8_decoder:
        models[VAE_DECODER] -= _fp8_decoder_savings(config.vae, size)
    parts = _dit_workspace(config, size), _decoder_workspace(config, decoder, fused_decoder, size)
    # A CUDA graph keeps its workspace; eager PyTorch uses the same memory for one after the other.
    workspace = sum(parts) if fused_dit or fused_decoder else max(parts)
    return ServerMemory(
        models=models,
        workspace=workspace + (CUDA_CONTEXT if on_cuda else 0),
        session=session_memory(config, dtype, decoder, fp8_attention=fp8_attention, fp8_decoder=fp8_decoder),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CausalLayers:
    """A causal convolution, or those of a residual block or of an upsampling."""

    cached: tuple[int, ...]
    """For each convolution, the channels of the two past frames that it keeps."""
    outputs: int
    scale: int
    """Height and width of its input, relative to the latents."""
    parameters: int
    """Of the whole block."""

    @property
    def is_residual(self) -> bool:
        return len(self.cached) == 2


def _vae_layers(config: VAEConfig) -> Iterator[_CausalLayers]:
    """All layers with a cache, in execution order."""
    dims = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
    top, base, scale = dims[0], dims[-1], 1
    yield _CausalLayers(cached=(config.z_dim,), outputs=top, scale=1, parameters=_linear(27 * config.z_dim, top))
    yield _residual_block(top, top, 1)
    yield _residual_block(top, top, 1)
    for stage, (channels, dim) in enumerate(itertools.pairwise(dims)):
        inputs = channels if stage == 0 else channels // 2
        for _ in range(config.num_res_blocks + 1):
            yield _residual_block(inputs, dim, scale)
            inputs = dim
        if stage < 3:
            temporal = stage < 2  # upsamples in time, too
            count = _linear(9 * dim, dim // 2) + (_linear(3 * dim, 2 * dim) if temporal else 0)
            cached = (dim,) if temporal else ()
            yield _CausalLayers(cached=cached, outputs=dim // 2, scale=scale, parameters=count)
            scale *= 2
    yield _CausalLayers(cached=(base,), outputs=3, scale=scale, parameters=base + _linear(27 * base, 3))


def _residual_block(inputs: int, outputs: int, scale: int) -> _CausalLayers:
    count = inputs + _linear(27 * inputs, outputs) + outputs + _linear(27 * outputs, outputs)
    if inputs != outputs:
        count += _linear(inputs, outputs)
    return _CausalLayers(cached=(inputs, outputs), outputs=outputs, scale=scale, parameters=count)


def _linear(inputs: int, outputs: int) -> int:
    """Weight and bias."""
    return inputs * outputs + outputs


def _fp8_savings(config: DiTConfig, size: int) -> int:
    """Of the blocks' GEMMs, except the prompt's keys and values: a byte per weight, and a scale per output."""
    dim, ffn = config.dim, config.ffn_dim
    weights = 6 * dim**2 + 2 * dim * ffn
    return config.num_layers * (weights * (size - 1) - 4 * (7 * dim + ffn))


def _fp8_decoder_savings(config: VAEConfig, size: int) -> int:
    """Like `_fp8_savings`, for the two convolutions of each residual block; their biases are float32."""
    blocks = [layer for layer in _vae_layers(config) if layer.is_residual]
    weights = sum(27 * inputs * layer.outputs for layer in blocks for inputs in layer.cached)
    return weights * (size - 1) - sum(2 * layer.outputs * (4 + 4 - size) for layer in blocks)


def _dit_workspace(config: ModelConfig, size: int) -> int:
    """A recache of the whole window: for each row two tensors of width `ffn_dim` and ten of width `dim`."""
    rows = config.window.window * config.tokens_per_frame
    return rows * (2 * config.dit.ffn_dim + 10 * config.dit.dim) * size


def _decoder_workspace(config: ModelConfig, decoder: str, fused: bool, size: int) -> int:
    """The caches before and after a latent frame, and frames; the fused decoder decodes a whole chunk at once."""
    channels = config.tiny_decoder.channels[-1] if decoder == TINY else config.vae.base_dim
    height, width = config.video_size
    frames = 4 * (config.window.chunk if fused else 1)
    caches = (1 if fused else 2) * decoder_cache_bytes(config, decoder, size)
    return caches + NUM_WIDE_TENSORS[decoder] * frames * channels * height * width * size
