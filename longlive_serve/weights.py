# SPDX-License-Identifier: Apache-2.0
"""Checkpoints -> networks with weights in them: files, key names, strict loading, random weights.

Called by `build_engines` and by replay. File and key names are those of the published checkpoints (reference
semantics section 10); nothing is ever unpickled beyond plain tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from longlive_serve.config import DIT, RANDOM_WEIGHTS, TEXT_ENCODER, TINY_DECODER, VAE_DECODER, NetworkConfig
from longlive_serve.models.causal_dit import CausalDiT
from longlive_serve.models.quantized import install, quantized_layers
from longlive_serve.models.text_encoder import BYTE_VOCABULARY, TextEncoder, Tokenizer, map_wan_names
from longlive_serve.models.tiny_decoder import TinyDecoder
from longlive_serve.models.vae_decoder import VAEDecoder

RANDOM_SEED = 20260101
DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TINY_DECODER_FILE = "taew2_1.pth"  # published as .safetensors as well
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"

QUANTIZED_FILE = "{}.quantized.safetensors"  # of `quantization/`, under the names of our networks
FILES = {TEXT_ENCODER: TEXT_ENCODER_FILE, DIT: DIT_FILE, VAE_DECODER: VAE_FILE, TINY_DECODER: TINY_DECODER_FILE}
_CLASSES: dict[str, Callable[[Any], nn.Module]] = {
    TEXT_ENCODER: TextEncoder,
    DIT: CausalDiT,
    VAE_DECODER: VAEDecoder,
    TINY_DECODER: TinyDecoder,
}
_OURS = {VAE_DECODER: ("decoder.", "conv2."), TINY_DECODER: ("decoder.",)}  # the rest of these files is encoders


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The three networks of one LongLive in PyTorch, in evaluation mode, and the tokenizer."""

    text_encoder: TextEncoder
    tokenizer: Tokenizer
    dit: CausalDiT
    vae_decoder: VAEDecoder


def load_networks(config: NetworkConfig, weights: str, device: str, dtype: torch.dtype) -> Networks:
    """The three networks of `config`, each as `load_network` gives it, and the tokenizer."""
    load = functools.partial(load_network, config=config, weights=weights, device=device, dtype=dtype)
    return Networks(
        text_encoder=load(TEXT_ENCODER),
        tokenizer=load_tokenizer(config, weights),
        dit=load(DIT),
        vae_decoder=load(VAE_DECODER),
    )


def load_network(name: str, config: NetworkConfig, weights: str, device: str, dtype: torch.dtype) -> Any:
    """The network `name` of `config` with the weights of the folder `weights`, or random ones from a fixed seed.

    The folder is laid out like the published Wan2.1-T2V-1.3B; where `quantization/` has put a quantized checkpoint of
    the network beside its file, or instead of it, that one counts. Raises ValueError that names the file and what is
    missing, unexpected or of another shape in it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        network: nn.Module = _CLASSES[name](getattr(config, name if name != VAE_DECODER else "vae"))
    network = network.to(device, dtype).eval()
    if (file := _file(name, weights)) is not None:
        state = _state(name, file, config)
        install(network, quantized_layers(state, device))
        load_strictly(network, state, file)
    return network


def load_state(name: str, config: NetworkConfig, weights: str) -> dict[str, Tensor]:
    """The tensors of a network's file in the folder `weights`, under our names and in the file's dtypes."""
    if (file := _file(name, weights)) is None:
        raise ValueError(f"weights: got {weights!r}, expected a folder of checkpoints")
    return _state(name, file, config)


def _state(name: str, file: Path, config: NetworkConfig) -> dict[str, Tensor]:
    """What the file holds, under the names of our network."""
    state = read_checkpoint(file)
    if file.name == QUANTIZED_FILE.format(name):
        return state
    if name in _OURS:
        state = {key: tensor for key, tensor in state.items() if key.startswith(_OURS[name])}
    if name == TEXT_ENCODER:
        state = map_wan_names(state, config.text_encoder.num_layers)
    return state


def _file(name: str, weights: str) -> Path | None:
    """The file of a network in the folder `weights`: the quantized one if there is one; None for random weights."""
    folder = _folder(weights)
    if folder is None:
        return None
    quantized, plain = folder / QUANTIZED_FILE.format(name), folder / FILES[name]
    if name == TINY_DECODER and not plain.exists() and plain.with_suffix(".safetensors").exists():
        plain = plain.with_suffix(".safetensors")
    return quantized if quantized.exists() else plain


def load_tokenizer(config: NetworkConfig, weights: str) -> Tokenizer:
    """The tokenizer in the folder `weights`, or the one of random weights, which needs no files."""
    folder = _folder(weights)
    if folder is None and config.text_encoder.vocab_size < BYTE_VOCABULARY:
        raise ValueError(
            f"weights: got {RANDOM_WEIGHTS!r} for preset {config.name}, expected a folder: its vocabulary of "
            f"{config.text_encoder.vocab_size} words is too small for the tokenizer of random weights"
        )
    return Tokenizer(config.dit.text_len, folder and folder / TOKENIZER_FOLDER)


def fingerprint(name: str, weights: str) -> str:
    """SHA-256 of the file that holds the network `name`, or `random`; empty when the folder has no such file."""
    file = _file(name, weights)
    if file is None:
        return RANDOM_WEIGHTS
    return sha256(file) if file.exists() else ""


def recipe(name: str, weights: str) -> str:
    """What the network `name` was quantized with; empty when it was not."""
    file = _file(name, weights)
    if file is None or file.name != QUANTIZED_FILE.format(name):
        return ""
    with safe_open(file, "pt") as checkpoint:
        return str((checkpoint.metadata() or {})["recipe"])


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _folder(weights: str) -> Path | None:
    folder = None if weights == RANDOM_WEIGHTS else Path(weights)
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"weights: got {weights!r}, expected a folder with {DIT_FILE}, {VAE_FILE}, ... or {RANDOM_WEIGHTS!r}"
        )
    return folder


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or of a torch file that holds nothing but tensors."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # each format has its own kinds
        raise ValueError(f"{path}: cannot be read as tensors: {type(error).__name__}: {error}") from None
    return state


def load_strictly(network: nn.Module, state: dict[str, Tensor], source: Path | str) -> None:
    """Copy `state` into `network`. Raises ValueError that lists what does not fit."""
    own = network.state_dict()
    problems = [f"missing {name}" for name in sorted(own.keys() - state.keys())]
    problems += [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
    problems += [
        f"{name}: got {list(state[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & state.keys())
        if own[name].shape != state[name].shape
    ]
    if problems:
        raise ValueError(f"{source}: does not fit the network:\n  " + "\n  ".join(problems))
    network.load_state_dict(state)
