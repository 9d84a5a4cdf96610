# SPDX-License-Identifier: Apache-2.0
"""Checkpoints -> networks with weights in them: files, key names, strict loading, random weights.

Called by `build_engines` and by replay. File and key names are those of the published checkpoints (reference
semantics section 10); nothing is ever unpickled beyond plain tensors.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from longlive_serve.config import RANDOM_WEIGHTS, NetworkConfig
from longlive_serve.models.causal_dit import CausalDiT
from longlive_serve.models.text_encoder import BYTE_VOCABULARY, TextEncoder, Tokenizer, map_wan_names
from longlive_serve.models.vae_decoder import VAEDecoder

RANDOM_SEED = 20260101
DIT_FILE = "diffusion_pytorch_model.safetensors"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks:
    """The three networks of one LongLive in PyTorch, in evaluation mode, and the tokenizer."""

    text_encoder: TextEncoder
    tokenizer: Tokenizer
    dit: CausalDiT
    vae_decoder: VAEDecoder


def load_networks(config: NetworkConfig, weights: str, device: str, dtype: torch.dtype) -> Networks:
    """Networks of `config` with the weights of the folder `weights`, or random ones from a fixed seed.

    The folder is laid out like the published Wan2.1-T2V-1.3B. Raises ValueError that names the file and what is
    missing, unexpected or of another shape in it.
    """
    folder = None if weights == RANDOM_WEIGHTS else Path(weights)
    if folder is not None and not folder.is_dir():
        raise ValueError(
            f"weights: got {weights!r}, expected a folder with {DIT_FILE}, {VAE_FILE}, ... or {RANDOM_WEIGHTS!r}"
        )
    if folder is None and config.text_encoder.vocab_size < BYTE_VOCABULARY:
        raise ValueError(
            f"weights: got {RANDOM_WEIGHTS!r} for preset {config.name}, expected a folder: its vocabulary of "
            f"{config.text_encoder.vocab_size} words is too small for the tokenizer of random weights"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        dit, vae_decoder = CausalDiT(config.dit), VAEDecoder(config.vae)
        text_encoder = TextEncoder(config.text_encoder)
    if folder is not None:
        load_strictly(dit, read_checkpoint(folder / DIT_FILE), folder / DIT_FILE)
        vae = {k: v for k, v in read_checkpoint(folder / VAE_FILE).items() if k.startswith(("decoder.", "conv2."))}
        load_strictly(vae_decoder, vae, folder / VAE_FILE)
        text = map_wan_names(read_checkpoint(folder / TEXT_ENCODER_FILE), config.text_encoder.num_layers)
        load_strictly(text_encoder, text, folder / TEXT_ENCODER_FILE)
    return Networks(
        text_encoder=text_encoder.to(device, dtype).eval(),
        tokenizer=Tokenizer(config.dit.text_len, folder and folder / TOKENIZER_FOLDER),
        dit=dit.to(device, dtype).eval(),
        vae_decoder=vae_decoder.to(device, dtype).eval(),
    )


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
