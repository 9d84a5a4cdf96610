# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files of the tiny preset with the names and layouts of the published ones, for tests of weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import ByT5Tokenizer

from longlive_serve.config.presets import DIT, MODELS, PRESETS, TEXT_ENCODER, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.models.text_encoder import wan_names
from longlive_serve.weights.layouts import (
    DIT_FILE,
    LONGLIVE_FILE,
    LONGLIVE_FOLDER,
    LORA_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    WAN_FOLDER,
)
from longlive_serve.weights.loader import ModelLoader, load_model

TINY = PRESETS["tiny"]
LAYERS = (*(f"{part}.{one}" for part in ("self_attn", "cross_attn") for one in "qkvo"), "ffn.0", "ffn.2")
State = dict[str, Tensor]


@functools.cache
def models() -> dict[str, nn.Module]:
    """Models with weights that differ from the `random` ones."""
    made: dict[str, nn.Module] = {name: load_model(name, TINY, "random", "cpu", torch.float32) for name in MODELS}
    for model in made.values():
        for parameter in model.parameters():
            parameter.data.add_(0.01)
    return made


def state_of(name: str) -> State:
    return {key: tensor.clone() for key, tensor in models()[name].state_dict().items()}


def wan_text_names() -> State:
    """The text encoder's tensors under the names of the Wan checkpoint."""
    state = state_of(TEXT_ENCODER)
    return {wan: state[own] for wan, own in wan_names(TINY.text_encoder.num_layers).items()}


def write_wan(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the flat layout of Wan2.1-T2V-1.3B."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {"encoder.conv1.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}  # present but unused
    save_file(cast(state_of(DIT), dtype), folder / DIT_FILE)
    torch.save(cast(state_of(VAE_DECODER) | encoder, dtype), folder / VAE_FILE)
    torch.save(cast(wan_text_names(), dtype), folder / TEXT_ENCODER_FILE)
    ByT5Tokenizer().save_pretrained(folder / TOKENIZER_FOLDER)
    return folder


def write_reference(folder: Path, dtype: torch.dtype = torch.bfloat16, lora: bool = True) -> Path:
    """Write the reference's layout; its Wan DiT differs from LongLive's."""
    write_wan(folder / WAN_FOLDER, dtype)
    save_file(state_of(DIT) | {"head.head.bias": torch.zeros(64)}, folder / WAN_FOLDER / DIT_FILE)
    (folder / LONGLIVE_FOLDER).mkdir(parents=True)
    write_longlive(folder / LONGLIVE_FOLDER / LONGLIVE_FILE, dtype)
    if lora:
        torch.save({"generator_lora": cast(lora_state(), dtype), "step": 7}, folder / LONGLIVE_FOLDER / LORA_FILE)
    return folder


def write_longlive(path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a LongLive checkpoint; its averaged weights are twice the others."""
    generator = {f"model.{key}": tensor for key, tensor in cast(state_of(DIT), dtype).items()}
    ema = {key.replace("model.", "model._fsdp_wrapped_module."): 2 * tensor for key, tensor in generator.items()}
    torch.save({"generator": generator, "generator_ema": ema, "step": 600}, path)


def write_sharded(state: Mapping[str, Tensor], path: Path, shards: int = 2) -> list[Path]:
    """Write shards and their index. `path`: of the unsharded file, which is not written. Returns the shards."""
    names = sorted(state)
    shard_of: dict[str, str] = {}
    paths = [path.with_name(f"{path.stem}-{n + 1:05}-of-{shards:05}.safetensors") for n in range(shards)]
    for n, shard in enumerate(paths):
        save_file({name: state[name] for name in names[n::shards]}, shard)
        shard_of |= dict.fromkeys(names[n::shards], shard.name)
    path.with_name(f"{path.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return paths


def lora_state(seed: int = 1, rank: int = 4, prefix: str = "base_model.model.") -> State:
    """A LoRA adapter for all layers of all blocks, in the published format."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for block in range(TINY.dit.num_layers):
        for layer in LAYERS:
            out, in_ = (
                (TINY.dit.ffn_dim, TINY.dit.dim)
                if layer == "ffn.0"
                else (TINY.dit.dim, TINY.dit.ffn_dim if layer == "ffn.2" else TINY.dit.dim)
            )
            name = f"{prefix}blocks.{block}.{layer}"
            state[f"{name}.lora_A.weight"] = torch.randn(rank, in_, generator=generator) / 8
            state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 8
    return state


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> State:
    return {key: tensor.to(dtype) for key, tensor in state.items()}


def loaded(name: str, folder: Path | str, dtype: torch.dtype = torch.float32, **settings: object) -> State:
    """The state of a model that a server loads from the folder; `settings` of serve.toml."""
    config = ServeConfig(preset="tiny", weights=str(folder), **settings)  # type: ignore[arg-type]
    return dict(ModelLoader.from_config(config).load_model(name, "cpu", dtype).state_dict())


def assert_equal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that the tensors are bitwise equal."""
    assert got.keys() == expected.keys()
    for name in unequal(got, expected):
        raise AssertionError(f"{name} differs")


def unequal(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    return (name for name, tensor in got.items() if not torch.equal(tensor, expected[name]))
