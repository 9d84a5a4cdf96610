# SPDX-License-Identifier: Apache-2.0
"""Engines: networks ready to run. `build_engines` is the only place where a backend is chosen."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from longlive_serve.config import NetworkConfig, ServeConfig
    from longlive_serve.engines.interface import DiT, Engines
    from longlive_serve.models.causal_dit import CausalDiT

log = logging.getLogger(__name__)


def build_engines(config: ServeConfig) -> Engines:
    """The engines that `config` asks for; what `auto` came to is logged once."""
    import torch

    from longlive_serve.engines.interface import Engines
    from longlive_serve.engines.torch_engine import TorchTextEncoder, TorchVAEDecoder
    from longlive_serve.weights import load_networks

    network = config.network
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    log.info("engine torch on %s, %s, preset %s, weights %s", device, dtype, network.name, config.weights)
    networks = load_networks(network, config.weights, device, getattr(torch, dtype))
    return Engines(
        text_encoder=TorchTextEncoder(networks.text_encoder, networks.tokenizer),
        dit=build_dit(config.engine, networks.dit, network, config.slots, config.variant),
        vae_decoder=TorchVAEDecoder(networks.vae_decoder, network),
        name="torch",
        device=device,
        dtype=dtype,
    )


def build_dit(engine: str, network: CausalDiT, config: NetworkConfig, slots: int, variant: str) -> DiT:
    """The DiT of `network`, which lies on its device in its dtype, run by `engine`."""
    from longlive_serve.engines.torch_engine import TorchDiT

    assert engine in ("auto", "torch"), engine
    return TorchDiT(network, config, slots, variant)
