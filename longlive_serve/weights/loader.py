# SPDX-License-Identifier: Apache-2.0
"""Folders of weights -> models with weights in them, adapters merged; or random weights from a fixed seed.

Called by `build_backends`, the export and `quantization/`. Where the files lie is for `weights_folder` to say, what is
in them for `checkpoint`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longlive_serve.config.presets import DIT, TEXT_ENCODER, VAE_DECODER, ModelConfig
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, Adapter, ServeConfig
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.text_encoder import BYTE_VOCABULARY, TextEncoder, Tokenizer
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.weights.checkpoint import Checkpoint, build, load_strictly
from longlive_serve.weights.layouts import (
    DIT_FILE,
    FILES,
    QUANTIZED,
    QUANTIZED_FILE,
    TEXT_ENCODER_FILE,
    TINY_DECODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    find,
    folder_of,
    own_adapter,
    tokenizer_folder,
)
from longlive_serve.weights.lora import merged_state
from longlive_serve.weights.tensor_files import files_of, metadata, read_tensors, sha256

__all__ = [
    "DIT_FILE", "FILES", "QUANTIZED_FILE", "TEXT_ENCODER_FILE", "TINY_DECODER_FILE", "TOKENIZER_FOLDER", "VAE_FILE",
    "Models", "adapters_of", "fingerprint", "load_model", "load_models", "load_state", "load_strictly",
    "load_tokenizer", "read_tensors", "recipe", "sha256",
]  # fmt: skip

log = logging.getLogger(__name__)

RANDOM_SEED = 20260101


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """The three models of one LongLive in PyTorch, in evaluation mode, and the tokenizer."""

    text_encoder: TextEncoder
    tokenizer: Tokenizer
    dit: CausalDiT
    vae_decoder: VAEDecoder


def load_models(config: ModelConfig, weights: str, device: str, dtype: torch.dtype) -> Models:
    """The three models of `config`, each as `load_model` gives it, and the tokenizer."""
    load = functools.partial(load_model, config=config, weights=weights, device=device, dtype=dtype)
    return Models(
        text_encoder=load(TEXT_ENCODER),
        tokenizer=load_tokenizer(config, weights),
        dit=load(DIT),
        vae_decoder=load(VAE_DECODER),
    )


def load_model(
    name: str,
    config: ModelConfig,
    weights: str,
    device: str,
    dtype: torch.dtype,
    *,
    adapters: Sequence[Adapter] | None = None,
    use_ema: bool = False,
) -> Any:
    """The model `name` of `config` with the weights of the folder `weights`, or random ones from a fixed seed.

    `adapters` go into the DiT and into no other model: exactly these; with None the folder's own lora.pt. `use_ema`:
    the DiT's averaged weights. The folder is laid out in one of the ways of `weights_folder`. Raises ValueError that
    names the file and what is wrong with it: what is missing, unexpected or of another shape in it.
    """
    checkpoint = _checkpoint(name, config, weights, adapters, use_ema)
    if checkpoint is not None:
        return checkpoint.model(device, dtype)
    if name == DIT and use_ema:
        raise ValueError("use_ema: got true with random weights, expected a folder with longlive_base.pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = build(name, config)
    if name == DIT and adapters:
        model.load_state_dict(merged_state(model.state_dict(), adapters))
    return model.to(device, dtype).eval()


def load_state(name: str, config: ModelConfig, weights: str) -> dict[str, Tensor]:
    """The tensors of a model's file in the folder `weights`, under our names and in the file's dtypes; no adapter.

    They lie in the mapped file: as long as they are in use it must stay as it is.
    """
    checkpoint = _checkpoint(name, config, weights, (), False)
    if checkpoint is None:
        raise ValueError(f"weights: got {weights!r}, expected a folder of checkpoints")
    return checkpoint.state()


def adapters_of(config: ServeConfig) -> list[Adapter]:
    """What is merged into the DiT that `config` serves: what `lora` names; if nothing, the folder's own lora.pt."""
    own = own_adapter(config.weights)
    if not config.lora:
        return [] if own is None else [Adapter(path=own)]
    if missing := [str(adapter.path) for adapter in config.lora if not adapter.path.is_file()]:
        raise ValueError(f"lora: {', '.join(missing)}: no such file")
    if own is not None and not any(adapter.path.resolve() == own.resolve() for adapter in config.lora):
        log.warning("dit: %s is there, and left out, as `lora` names others; LongLive is both", own)
    return [*config.lora]


def load_tokenizer(config: ModelConfig, weights: str) -> Tokenizer:
    """The tokenizer in the folder `weights`, or the one of random weights, which needs no files."""
    folder = folder_of(weights)
    if folder is None and config.text_encoder.vocab_size < BYTE_VOCABULARY:
        raise ValueError(
            f"weights: got {RANDOM_WEIGHTS!r} for preset {config.name}, expected a folder: its vocabulary of "
            f"{config.text_encoder.vocab_size} words is too small for the tokenizer of random weights"
        )
    return Tokenizer(config.dit.text_len, folder and tokenizer_folder(folder))


def fingerprint(name: str, weights: str, adapters: Sequence[Adapter] | None = None, use_ema: bool = False) -> str:
    """SHA-256 of what the model `name` is loaded from, or `random`; empty when the folder has no such file.

    Of one file it is the file's; of several (shards, adapters with their scales) it is one of all of theirs.
    """
    file = find(name, weights)
    if file is not None and not file.path.exists():
        return ""
    hashes = [RANDOM_WEIGHTS] if file is None else [sha256(part) for part in files_of(file.path)]
    for adapter in _adapters(name, weights, adapters):
        hashes += [sha256(adapter.path), repr((adapter.scale, adapter.alpha))]
    if use_ema and name == DIT:
        hashes.append("EMA")
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def recipe(name: str, weights: str) -> str:
    """What the model `name` was quantized with; empty when it was not."""
    file = find(name, weights)
    return "" if file is None or file.kind != QUANTIZED else metadata(file.path)["recipe"]


def _checkpoint(
    name: str, config: ModelConfig, weights: str, adapters: Sequence[Adapter] | None, use_ema: bool
) -> Checkpoint | None:
    """None for random weights."""
    file = find(name, weights)
    if file is None:
        return None
    adapters, use_ema = _adapters(name, weights, adapters), use_ema and name == DIT
    return Checkpoint(name=name, config=config, file=file, adapters=adapters, use_ema=use_ema)


def _adapters(name: str, weights: str, adapters: Sequence[Adapter] | None) -> Sequence[Adapter]:
    """Those of the model `name`, as `load_model` says."""
    if name != DIT:
        return ()
    if adapters is not None:
        return adapters
    own = own_adapter(weights)
    return [] if own is None else [Adapter(path=own)]
