# SPDX-License-Identifier: Apache-2.0
"""Folders of weights: which layouts are loaded, which file counts, and what is in memory meanwhile."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from longlive_serve.config.presets import DIT, MODELS, PRESETS, TEXT_ENCODER, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.weights import tensor_files
from longlive_serve.weights.checkpoint import build
from longlive_serve.weights.layouts import (
    DIT_FILE,
    LONGLIVE_FILE,
    LONGLIVE_FOLDER,
    LORA_FILE,
    TEXT_ENCODER_FILE,
    VAE_FILE,
    WAN_FOLDER,
)
from longlive_serve.weights.loader import RANDOM_SEED, ModelLoader, load_model
from longlive_serve.weights.tensor_files import sha256
from tests.support.weights_files import (
    TINY,
    assert_equal,
    cast,
    loaded,
    state_of,
    wan_text_names,
    write_longlive,
    write_reference,
    write_sharded,
    write_wan,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "weights")


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_are_the_same_every_time_and_those_of_their_seed(name: str) -> None:
    state = loaded(name, "random")
    torch.manual_seed(RANDOM_SEED)
    assert_equal(state, build(name, TINY).state_dict())
    assert all(tensor.any() or key.endswith("bias") for key, tensor in state.items())


def test_a_preset_whose_vocabulary_is_too_small_has_no_random_weights() -> None:
    with pytest.raises(ValueError, match="got 'random' for preset demo, expected a folder: its vocabulary of 64 words"):
        ModelLoader.open(PRESETS["demo"], "random").load_tokenizer()


@pytest.mark.parametrize("name", MODELS)
def test_the_flat_layout_is_loaded(folder: Path, name: str) -> None:
    assert_equal(loaded(name, folder), state_of(name))


def test_the_tokenizer_of_a_folder_is_loaded(folder: Path) -> None:
    for weights in (folder, write_reference(folder / "reference")):
        tokenizer = ModelLoader.open(TINY, str(weights)).load_tokenizer()
        assert tokenizer("fox").ids.tolist() == ModelLoader.open(TINY, "random").load_tokenizer()("fox").ids.tolist()


@pytest.mark.parametrize("name", MODELS)
def test_the_layout_of_the_reference_is_loaded(tmp_path: Path, name: str) -> None:
    write_reference(tmp_path, lora=False)
    assert_equal(loaded(name, tmp_path, torch.bfloat16), cast(state_of(name), torch.bfloat16))
    assert_equal(loaded(name, tmp_path), cast(cast(state_of(name), torch.bfloat16), torch.float32))


def test_the_layout_of_the_reference_without_longlive_is_no_longlive(tmp_path: Path) -> None:
    write_reference(tmp_path)
    (tmp_path / LONGLIVE_FOLDER / LONGLIVE_FILE).unlink()
    with pytest.raises(ValueError, match=f"{LONGLIVE_FILE}: no such file"):
        loaded(DIT, tmp_path)


@pytest.mark.parametrize("key", ["generator", "model", None])
@pytest.mark.parametrize("prefix", ["model.", "", "model._fsdp_wrapped_module."])
def test_longlive_counts_before_wan_under_each_of_its_keys(folder: Path, key: str | None, prefix: str) -> None:
    other = {f"{prefix}{name}": tensor * 3 for name, tensor in state_of(DIT).items()}
    torch.save({key: other, "critic": {}} if key else other, folder / LONGLIVE_FILE)
    assert_equal(loaded(DIT, folder), {name: tensor * 3 for name, tensor in state_of(DIT).items()})


def test_the_averaged_weights_are_those_of_use_ema(folder: Path) -> None:
    with pytest.raises(ValueError, match="use_ema, expected a torch file with generator_ema"):
        loaded(DIT, folder, use_ema=True)
    write_longlive(folder / LONGLIVE_FILE, torch.float32)
    assert_equal(loaded(DIT, folder), state_of(DIT))
    assert_equal(loaded(DIT, folder, use_ema=True), {key: 2 * tensor for key, tensor in state_of(DIT).items()})
    torch.save({"generator": state_of(DIT), "step": 5}, folder / LONGLIVE_FILE)
    with pytest.raises(ValueError, match="got generator, step, expected the key generator_ema"):
        loaded(DIT, folder, use_ema=True)


@pytest.mark.parametrize("name", [DIT, TEXT_ENCODER])
def test_shards_are_one_file(folder: Path, name: str) -> None:
    path = folder / {DIT: DIT_FILE, TEXT_ENCODER: TEXT_ENCODER_FILE}[name]
    path.unlink()
    shards = write_sharded(state_of(DIT) if name == DIT else wan_text_names(), path.with_suffix(".safetensors"), 3)
    assert_equal(loaded(name, folder), state_of(name))
    assert ModelLoader.open(TINY, str(folder)).fingerprint(name) not in ("", *map(sha256, shards))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shard_size", ["10GB", "30KB"])
def test_a_pipeline_of_diffusers_is_loaded(tmp_path: Path, name: str, shard_size: str) -> None:
    from longlive_serve.weights.diffusers_mapping import FILES, from_diffusers
    from tests.longlive_serve.models.test_against_diffusers import randomise, their_model

    theirs = their_model(name, TINY)
    randomise(theirs)
    theirs.save_pretrained(tmp_path / Path(FILES[name]).parent, max_shard_size=shard_size)
    assert_equal(loaded(name, tmp_path), from_diffusers(name, dict(theirs.state_dict())))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_files_of_any_float_dtype_are_loaded_in_the_one_asked_for(tmp_path: Path, dtype: torch.dtype) -> None:
    write_wan(tmp_path, dtype)
    for name in MODELS:
        state = loaded(name, tmp_path, torch.bfloat16)
        assert_equal(state, cast(cast(state_of(name), dtype), torch.bfloat16))


def test_constants_that_no_file_holds_are_right_and_nothing_is_on_meta(folder: Path) -> None:
    for name in MODELS:
        made, plain = (load_model(name, TINY, path, "cpu", torch.bfloat16) for path in (str(folder), "random"))
        assert_equal(dict(made.named_buffers()), dict(plain.named_buffers()))
        assert not any(tensor.is_meta for tensor in made.parameters())
        assert not made.training
        assert name != VAE_DECODER or {"mean", "std"} == dict(made.named_buffers()).keys()


class Made(TorchDispatchMode):
    """Counts the numbers of float32 tensors that are made."""

    def __init__(self) -> None:
        super().__init__()
        self.float32 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, Tensor) and not tensor.is_meta and tensor.dtype == torch.float32:
                self.float32 += tensor.numel()
        return out


@pytest.mark.parametrize("name", MODELS)
def test_no_copy_in_float32_is_made_on_the_way(tmp_path: Path, name: str) -> None:
    write_wan(tmp_path, torch.bfloat16)
    with Made() as made:
        loaded(name, tmp_path, torch.bfloat16)
    assert made.float32 <= 4 * 16  # the constants of the VAE


def test_what_has_been_read_of_a_mapped_file_is_let_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def load(path: Path) -> dict[str, Tensor]:
        opened.append(path)
        return load_file(path)

    monkeypatch.setattr(tensor_files, "load_file", load)
    expected = loaded(DIT, folder)
    often = len(opened)
    monkeypatch.setattr(tensor_files, "PIECE", 100_000)
    assert_equal(loaded(DIT, folder), expected)
    assert len(opened) - often > often + 3


def test_a_loaded_model_does_not_depend_on_its_file(folder: Path) -> None:
    states = {name: loaded(name, folder) for name in MODELS}
    for file in (DIT_FILE, VAE_FILE, TEXT_ENCODER_FILE):
        (folder / file).write_bytes(b"\0" * (folder / file).stat().st_size)
    for name in MODELS:
        assert_equal(states[name], state_of(name))


def test_a_file_in_the_format_of_old_torch_is_loaded(folder: Path) -> None:
    torch.save(state_of(VAE_DECODER), folder / VAE_FILE, _use_new_zipfile_serialization=False)
    assert_equal(loaded(VAE_DECODER, folder), state_of(VAE_DECODER))


def test_what_was_chosen_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from longlive_serve.backends.registry import build_backends

    caplog.set_level(logging.INFO)
    write_reference(tmp_path)
    build_backends(ServeConfig(preset="tiny", weights=str(tmp_path), backend="torch", device="cpu"))
    said = [record.message for record in caplog.records if record.name.startswith("longlive_serve")]
    for path in (
        tmp_path / WAN_FOLDER / TEXT_ENCODER_FILE,
        tmp_path / WAN_FOLDER / VAE_FILE,
        tmp_path / LONGLIVE_FOLDER / LONGLIVE_FILE,
        tmp_path / LONGLIVE_FOLDER / LORA_FILE,
    ):
        assert len([line for line in said if str(path) in line]) == 1, path


def test_a_converted_file_counts_before_a_published_one(folder: Path) -> None:
    save_file({key: tensor * 5 for key, tensor in state_of(DIT).items()}, folder / "dit.safetensors")
    assert_equal(loaded(DIT, folder), {key: tensor * 5 for key, tensor in state_of(DIT).items()})


def test_a_fingerprint_is_that_of_the_file(folder: Path, tmp_path: Path) -> None:
    assert ModelLoader.open(TINY, str(folder)).fingerprint(DIT) == sha256(folder / DIT_FILE)
    assert ModelLoader.open(TINY, "random").fingerprint(DIT) == "random"
    (folder / DIT_FILE).unlink()
    assert ModelLoader.open(TINY, str(folder)).fingerprint(DIT) == ""
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match="expected a folder with"):
        ModelLoader.open(TINY, str(folder)).fingerprint(DIT)
