# SPDX-License-Identifier: Apache-2.0
"""How much memory LongLive takes: parameters of the models, bytes of a session, sessions that fit. Pure Python.

Read by the doctor and by who plans for a GPU. It repeats in numbers what `models/` builds; tests hold the two together.
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
CUDA_CONTEXT = GIB  # what CUDA and its libraries keep for themselves in a process, rounded up
WIDE_PICTURES = {WAN: 5, TINY: 3}  # of a decoder's widest tensors, how many there are at once; rounded up


def dit_parameters(config: DiTConfig) -> int:
    dim, ffn = config.dim, config.ffn_dim
    attention = 4 * _linear(dim, dim) + 2 * dim  # with the norms of queries and keys
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
    top = layers[0].outputs
    count = _linear(config.z_dim, config.z_dim) + sum(layer.parameters for layer in layers)
    return count + top + _linear(top, 3 * top) + _linear(top, top)  # the attention


def tiny_decoder_parameters(config: TinyDecoderConfig) -> int:
    count = 9 * config.z_dim * config.channels[0] + config.channels[0] + 27 * config.channels[-1] + 3
    for (channels, following), frames in zip(itertools.pairwise(config.channels), (1, 2, 2), strict=True):
        memory_block = 9 * 4 * channels**2 + 3 * channels
        count += 3 * memory_block + frames * channels**2 + 9 * channels * following
    return count


def parameters(config: ModelConfig, model: str) -> int:
    """Of one of the models, or of the tiny decoder."""
    if model == DIT:
        return dit_parameters(config.dit)
    if model == TEXT_ENCODER:
        return text_encoder_parameters(config.text_encoder)
    if model == TINY_DECODER:
        return tiny_decoder_parameters(config.tiny_decoder)
    return vae_decoder_parameters(config.vae)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SessionMemory:
    """Bytes that one session holds once its window is full."""

    kv_slot: int
    """Its share of the KV cache. The shares of all slots are allocated when the server starts."""
    prompt_kv: int
    """Keys and values of its prompt; the fused backend may hold fewer."""
    decoder_cache: int
    latents: int
    """Clean ones, of window and sink."""

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
    per_row = 2 * dit.num_layers * dit.dim  # numbers: a key and a value in every layer
    picture = dit.channels * config.latent_height * config.latent_width
    return SessionMemory(
        kv_slot=window.window * config.tokens_per_frame * per_row * (1 if fp8_attention else size),
        prompt_kv=dit.text_len * per_row * size,
        decoder_cache=decoder_cache_bytes(config, decoder, size, fp8_decoder),
        latents=(window.window + window.sink) * picture * size,
    )


def decoder_cache_bytes(config: ModelConfig, decoder: str, size: int, fp8: bool = False) -> int:
    """The cache of a stream, `size` bytes to a number; with `fp8` one to those of residual blocks."""
    if decoder == TINY:
        widths = config.tiny_decoder.channels[:-1]
        per_pixel = sum(3 * channels * size << 2 * stage for stage, channels in enumerate(widths))
    else:
        per_pixel = sum(
            2 * sum(layer.cached) * layer.scale**2 * (1 if fp8 and layer.is_residual else size)
            for layer in _vae_layers(config.vae)
        )
    return per_pixel * config.latent_height * config.latent_width


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerMemory:
    """Bytes that a server takes on its device."""

    models: dict[str, int]
    working: int
    """What a chunk and a recache take while they are computed: an estimate, rounded up."""
    session: SessionMemory

    def total(self, sessions: int) -> int:
        return sum(self.models.values()) + self.working + sessions * self.session.total

    def sessions_in(self, memory: int) -> int:
        """How many sessions fit."""
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
    """Of the models in PyTorch. Graphs and plans hold the same weights; what they work in is their own affair."""
    size = BYTES_OF[dtype]
    drawn_by = TINY_DECODER if decoder == TINY else VAE_DECODER
    models = {model: size * parameters(config, model) for model in (TEXT_ENCODER, DIT, drawn_by)}
    if fp8:
        models[DIT] -= _saved_by_fp8(config.dit, size)
    if fp8_decoder:
        models[VAE_DECODER] -= _saved_by_fp8_decoder(config.vae, size)
    parts = _dit_working(config, size), _decoder_working(config, decoder, fused_decoder, size)
    # CUDA graphs keep what they worked in; PyTorch itself gives it to who comes next.
    working = sum(parts) if fused_dit or fused_decoder else max(parts)
    return ServerMemory(
        models=models,
        working=working + (CUDA_CONTEXT if on_cuda else 0),
        session=session_memory(config, dtype, decoder, fp8_attention=fp8_attention, fp8_decoder=fp8_decoder),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _CausalLayers:
    """The causal convolutions of a residual block or of an upsampling, or one alone."""

    cached: tuple[int, ...]
    """Channels that each of them keeps two past frames of."""
    outputs: int
    scale: int
    """Pixels per latent pixel, in height and in width, where it works."""
    parameters: int
    """Of all that belongs to the block."""

    @property
    def is_residual(self) -> bool:
        return len(self.cached) == 2


def _vae_layers(config: VAEConfig) -> Iterator[_CausalLayers]:
    """All that the VAE decoder caches, in execution order."""
    widths = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
    top, base, scale = widths[0], widths[-1], 1
    yield _CausalLayers(cached=(config.z_dim,), outputs=top, scale=1, parameters=_linear(27 * config.z_dim, top))
    yield _residual_block(top, top, 1)
    yield _residual_block(top, top, 1)
    for stage, (channels, width) in enumerate(itertools.pairwise(widths)):
        inputs = channels if stage == 0 else channels // 2
        for _ in range(config.num_res_blocks + 1):
            yield _residual_block(inputs, width, scale)
            inputs = width
        if stage < 3:
            doubles_time = stage < 2
            count = _linear(9 * width, width // 2) + (_linear(3 * width, 2 * width) if doubles_time else 0)
            cached = (width,) if doubles_time else ()
            yield _CausalLayers(cached=cached, outputs=width // 2, scale=scale, parameters=count)
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


def _saved_by_fp8(config: DiTConfig, size: int) -> int:
    """The products of the blocks (but for the prompt's keys and values) take a byte, and a scale for every output."""
    dim, ffn = config.dim, config.ffn_dim
    weights = 6 * dim**2 + 2 * dim * ffn
    return config.num_layers * (weights * (size - 1) - 4 * (7 * dim + ffn))


def _saved_by_fp8_decoder(config: VAEConfig, size: int) -> int:
    """As `_saved_by_fp8`, for the two convolutions of every residual block; their biases are float32."""
    blocks = [layer for layer in _vae_layers(config) if layer.is_residual]
    weights = sum(27 * inputs * layer.outputs for layer in blocks for inputs in layer.cached)
    return weights * (size - 1) - sum(2 * layer.outputs * (4 + 4 - size) for layer in blocks)


def _dit_working(config: ModelConfig, size: int) -> int:
    """A recache of the whole window: its rows, twice as wide as the FFN and some times as the model."""
    rows = config.window.window * config.tokens_per_frame
    return rows * (2 * config.dit.ffn_dim + 10 * config.dit.dim) * size


def _decoder_working(config: ModelConfig, decoder: str, fused: bool, size: int) -> int:
    """The caches before and after a latent frame, and pictures. The fused one has a whole chunk of them at once."""
    channels = config.tiny_decoder.channels[-1] if decoder == TINY else config.vae.base_dim
    height, width = config.video_size
    frames = 4 * (config.window.chunk if fused else 1)
    caches = (1 if fused else 2) * decoder_cache_bytes(config, decoder, size)
    return caches + WIDE_PICTURES[decoder] * frames * channels * height * width * size
