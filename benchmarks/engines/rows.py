# SPDX-License-Identifier: Apache-2.0
"""The benchmark's rows: named server settings, and the backends built from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from benchmarks.engines.baseline.dit import EagerDiT
from benchmarks.engines.baseline.vae import as_reference
from benchmarks.engines.models import RandomModelLoader
from benchmarks.engines.prompts import WordEncoder
from longlive_serve.backends.base import Backends
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT, TorchTextEncoder, TorchVAEDecoder
from longlive_serve.config.presets import TINY
from longlive_serve.config.serve_config import FUSED, ONNXRUNTIME, TENSORRT, TORCH, ServeConfig
from longlive_serve.models.vae.decoder import VAEDecoder

BASELINE = "eager baseline"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A name and its settings (keys of ServeConfig)."""

    name: str
    settings: Mapping[str, object]

    @property
    def is_baseline(self) -> bool:
        return self.name == BASELINE


ROWS = (
    Row(name=BASELINE, settings={"backend": TORCH}),
    Row(name="torch", settings={"backend": TORCH}),
    Row(name="fused", settings={"backend": FUSED}),
    Row(name="fused fp8", settings={"backend": FUSED, "fp8": True}),
    Row(name="fused fp8 attention", settings={"backend": FUSED, "fp8": True, "fp8_attention": True}),
    Row(
        name="fused all fp8",
        settings={"backend": FUSED, "fp8": True, "fp8_attention": True, "fp8_decoder": True},
    ),
    Row(name="torch tiny", settings={"backend": TORCH, "decoder": TINY}),
    Row(name="fused tiny", settings={"backend": FUSED, "decoder": TINY}),
    Row(name="fused fp8 tiny", settings={"backend": FUSED, "fp8": True, "decoder": TINY}),
    Row(
        name="fused fp8 attention tiny",
        settings={"backend": FUSED, "fp8": True, "fp8_attention": True, "decoder": TINY},
    ),
)
"""In measuring order. `attention`: FP8 attention; `tiny`: the tiny decoder instead of the Wan VAE."""


def exported(graphs: Path | None, tensorrt_engines: Path | None) -> list[Row]:
    """Rows for exported DiT and VAE decoder graphs; the text encoder is the torch backend's, as in all rows."""
    folders = ((ONNXRUNTIME, "graphs", graphs), (TENSORRT, "tensorrt_engines", tensorrt_engines))
    return [
        Row(name=backend, settings={"backend": backend, "text_encoder_backend": TORCH, key: str(folder)})
        for backend, key, folder in folders
        if folder is not None
    ]


def build(row: Row, config: ServeConfig) -> Backends:
    """Build a row's backends with random weights. Raises ValueError or ImportError if this machine cannot run them."""
    if config.backend == FUSED and not config.device.startswith("cuda"):
        raise ValueError(f"backend {FUSED} on {config.device}: its kernels need a GPU")
    if row.is_baseline:
        return _build_baseline(config)
    return with_words(build_backends(config, RandomModelLoader.from_config(config)), config)


def _build_baseline(config: ServeConfig) -> Backends:
    loader = RandomModelLoader.from_config(config)
    backends = with_words(build_backends(dataclasses.replace(config, slots=1), loader), config)
    dit, decoder = backends.dit, backends.vae_decoder
    assert isinstance(dit, TorchDiT)
    assert isinstance(decoder, TorchVAEDecoder)
    assert isinstance(decoder.model, VAEDecoder)
    return dataclasses.replace(
        backends,
        dit=EagerDiT(dit.model, config.model_config, config.slots),
        vae_decoder=TorchVAEDecoder(as_reference(decoder.model), config.model_config),
        name="eager",
    )


def with_words(backends: Backends, config: ServeConfig) -> Backends:
    """Replace the text encoder by a `WordEncoder`, which needs no tokenizer."""
    assert isinstance(backends.text_encoder, TorchTextEncoder)
    return dataclasses.replace(backends, text_encoder=WordEncoder(backends.text_encoder, config.model_config))
