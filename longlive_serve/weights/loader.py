# SPDX-License-Identifier: Apache-2.0
"""Loads models from a folder of weights, with adapters merged, or with random weights from a fixed seed.

Called by `build_backends`, the export and `quantization/`. `layouts` finds the files, `checkpoint` reads them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from longlive_serve.config.presets import DIT, ModelConfig
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, Adapter, ServeConfig
from longlive_serve.models.text_encoder import BYTE_VOCABULARY, Tokenizer
from longlive_serve.weights.checkpoint import Checkpoint, build
from longlive_serve.weights.layouts import QUANTIZED, WeightsFolder
from longlive_serve.weights.lora import merged_state
from longlive_serve.weights.tensor_files import files_of, metadata, sha256

log = logging.getLogger(__name__)

RANDOM_SEED = 20260101


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelLoader:
    """Loads the models of one folder of weights."""

    config: ModelConfig
    folder: WeightsFolder | None
    """None: random weights."""
    adapters: Sequence[Adapter] = ()
    """The adapters to merge into the DiT."""
    use_ema: bool = False
    """Load the averaged (EMA) weights of the DiT."""

    @classmethod
    def open(
        cls, config: ModelConfig, weights: str, lora: Sequence[Adapter] = (), use_ema: bool = False
    ) -> ModelLoader:
        """`lora`: the adapters; if empty, the folder's own lora.pt. Raises ValueError for missing files."""
        folder = WeightsFolder.resolve(weights)
        return cls(config=config, folder=folder, adapters=get_adapters(folder, lora), use_ema=use_ema)

    @classmethod
    def from_config(cls, config: ServeConfig) -> ModelLoader:
        return cls.open(config.model_config, config.weights, config.lora, config.use_ema)

    def load_model(self, name: str, device: str, dtype: torch.dtype) -> Any:
        """The model `name` in evaluation mode. Raises ValueError that names the file and its missing, unexpected or
        wrongly shaped tensors."""
        checkpoint = self.checkpoint(name)
        if checkpoint is not None:
            return checkpoint.load_model(device, dtype)
        if name == DIT and self.use_ema:
            raise ValueError("use_ema: got true with random weights, expected a folder with longlive_base.pt")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = build(name, self.config)
        if name == DIT and self.adapters:
            model.load_state_dict(merged_state(model.state_dict(), self.adapters))
        return model.to(device, dtype).eval()

    def load_tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; for random weights a tokenizer that needs no files."""
        config = self.config
        if self.folder is None and config.text_encoder.vocab_size < BYTE_VOCABULARY:
            raise ValueError(
                f"weights: got {RANDOM_WEIGHTS!r} for preset {config.name}, expected a folder: its vocabulary of "
                f"{config.text_encoder.vocab_size} words is too small for the tokenizer of random weights"
            )
        return Tokenizer(config.dit.text_len, self.folder.tokenizer if self.folder is not None else None)

    def checkpoint(self, name: str) -> Checkpoint | None:
        """The checkpoint of the model `name`; None for random weights."""
        if self.folder is None:
            return None
        file, is_dit = self.folder.files[name], name == DIT
        adapters, use_ema = self.adapters if is_dit else (), self.use_ema and is_dit
        return Checkpoint(name=name, config=self.config, file=file, adapters=adapters, use_ema=use_ema)

    def fingerprint(self, name: str) -> str:
        """SHA-256 of the files of the model `name`, or `random`; empty if the folder has no file of it.

        For one file it is the file's hash; for several (shards, adapters with their scales) a hash of their hashes.
        """
        if self.folder is None:
            hashes = [RANDOM_WEIGHTS]
        elif not (path := self.folder.files[name].path).exists():
            return ""
        else:
            hashes = [sha256(shard) for shard in files_of(path)]
        if name == DIT:
            for adapter in self.adapters:
                hashes += [sha256(adapter.path), repr((adapter.scale, adapter.alpha))]
            hashes += ["EMA"] * self.use_ema
        return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    def recipe(self, name: str) -> str:
        """The quantization recipe of the model `name`; empty if it is not quantized."""
        file = self.folder and self.folder.files[name]
        return metadata(file.path)["recipe"] if file and file.kind == QUANTIZED else ""


def load_model(name: str, config: ModelConfig, weights: str, device: str, dtype: torch.dtype) -> Any:
    """One model of the folder `weights`, or with random weights; see `ModelLoader.load_model`."""
    return ModelLoader.open(config, weights).load_model(name, device, dtype)


def get_adapters(folder: WeightsFolder | None, lora: Sequence[Adapter]) -> Sequence[Adapter]:
    """The adapters to merge into the DiT: those in `lora`; if empty, the folder's own lora.pt."""
    own = folder.lora if folder is not None else None
    if not lora:
        return [] if own is None else [Adapter(path=own)]
    if missing := [str(adapter.path) for adapter in lora if not adapter.path.is_file()]:
        raise ValueError(f"lora: {', '.join(missing)}: no such file")
    if own is not None and not any(adapter.path.resolve() == own.resolve() for adapter in lora):
        log.warning(
            "dit: %s is not merged, because `lora` names other adapters; LongLive consists of base and adapter", own
        )
    return lora
