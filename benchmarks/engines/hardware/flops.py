# SPDX-License-Identifier: Apache-2.0
"""FLOPs of a forward: two for each multiply-add of matrix products, attention and convolutions.

The benchmark divides by them to get the share of the device's speed that a backend reaches. Elementwise operations,
norms and RoPE are not counted, nor are the embeddings and the head, about a thousandth of the total.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from longlive_serve.config.presets import TINY, ModelConfig
from longlive_serve.models.dit.flow_match_scheduler import DENOISING_STEPS
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.models.vae.tiny_decoder import TinyDecoder


def dit_pass(config: ModelConfig, frames: int, window: int) -> float:
    """One forward of `frames` latent frames that attends to `window` of them, its own included."""
    return config.dit.num_layers * (_linear(config, frames) + _attention(config, frames, window))


def kv_cache_update(config: ModelConfig, frames: int, window: int) -> float:
    """Like `dit_pass`, but the last layer stops after its keys and values, as the rest of its output is unused."""
    last = _linear(config, frames) + _attention(config, frames, window)
    return dit_pass(config, frames, window) - last + 2 * _projection(config, frames)


def dit_chunk(config: ModelConfig, whole_update: bool) -> float:
    """The denoising steps and the KV-cache update of a chunk, with a full window. `whole_update`: the update runs the
    last layer in full."""
    size = config.window.chunk, config.window.window
    last = dit_pass(config, *size) if whole_update else kv_cache_update(config, *size)
    return len(DENOISING_STEPS) * dit_pass(config, *size) + last


def recache(config: ModelConfig, whole: bool) -> float:
    """A recache with a full window. `whole`: all frames and layers, as in the reference, although the sink's keys and
    values are kept and the last layer's output is unused."""
    window, sink = config.window.window, config.window.sink
    return dit_pass(config, window, window) if whole else kv_cache_update(config, window - sink, window)


def decoder_chunk(config: ModelConfig, decoder: str) -> float:
    """The decoder on the latents of one chunk in the middle of a video: counted on meta tensors."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = TinyDecoder(config.tiny_decoder) if decoder == TINY else VAEDecoder(config.vae).to("meta")
        size = config.latent_height, config.latent_width
        latents = torch.empty(1, config.window.chunk, config.dit.channels, *size)
        model(latents, model.initial_cache(1, *size, "meta", torch.float32), is_first=False)
    return float(counter.get_total_flops())


def _projection(config: ModelConfig, frames: int) -> float:
    """A dim x dim linear layer."""
    return 2 * frames * config.tokens_per_frame * config.dit.dim**2


def _linear(config: ModelConfig, frames: int) -> float:
    """A block's linear layers: q, k, v and output of self-attention, q and output of cross-attention, FFN."""
    ffn = 4 * frames * config.tokens_per_frame * config.dit.dim * config.dit.ffn_dim
    return 6 * _projection(config, frames) + ffn


def _attention(config: ModelConfig, frames: int, window: int) -> float:
    """Self- and cross-attention of a block; cross-attention includes the prompt's padding, as in the reference."""
    keys = window * config.tokens_per_frame + config.dit.text_len
    return 4 * frames * config.tokens_per_frame * keys * config.dit.dim
