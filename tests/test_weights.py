# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the published layout: what is loaded, what is refused and how."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import ByT5Tokenizer

from longlive_serve.config import PRESETS
from longlive_serve.models.text_encoder import wan_names
from longlive_serve.weights import DIT_FILE, TEXT_ENCODER_FILE, TOKENIZER_FOLDER, VAE_FILE, Networks, load_networks

TINY = PRESETS["tiny"]


def random_networks() -> Networks:
    return load_networks(TINY, "random", "cpu", torch.float32)


def wan_text_names(networks: Networks) -> dict[str, Tensor]:
    """The text encoder's tensors under the names of the Wan checkpoint."""
    state = networks.text_encoder.state_dict()
    return {wan: state[own] for wan, own in wan_names(TINY.text_encoder.num_layers).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder of the tiny preset, weights shifted so that they are not the random ones."""
    networks = random_networks()
    for network in (networks.dit, networks.vae_decoder, networks.text_encoder):
        for parameter in network.parameters():
            parameter.data.add_(0.01)
    encoder = {"encoder.conv1.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}  # there, and not needed
    save_file(networks.dit.state_dict(), tmp_path / DIT_FILE)
    torch.save(networks.vae_decoder.state_dict() | encoder, tmp_path / VAE_FILE)
    torch.save(wan_text_names(networks), tmp_path / TEXT_ENCODER_FILE)
    ByT5Tokenizer().save_pretrained(tmp_path / TOKENIZER_FOLDER)
    return tmp_path


def test_random_weights_are_the_same_every_time() -> None:
    first, second = random_networks(), random_networks()
    for name, tensor in first.dit.state_dict().items():
        assert torch.equal(tensor, second.dit.state_dict()[name])
        assert tensor.any() or name.endswith("bias"), f"{name} is zero"


def test_a_preset_whose_vocabulary_is_too_small_has_no_random_weights() -> None:
    with pytest.raises(ValueError, match="got 'random' for preset demo, expected a folder: its vocabulary of 64 words"):
        load_networks(PRESETS["demo"], "random", "cpu", torch.float32)


def test_a_folder_in_the_published_layout_is_loaded(folder: Path) -> None:
    plain, loaded = random_networks(), load_networks(TINY, str(folder), "cpu", torch.float32)
    for before, after in (
        (plain.dit, loaded.dit),
        (plain.vae_decoder, loaded.vae_decoder),
        (plain.text_encoder, loaded.text_encoder),
    ):
        for name, tensor in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], tensor + 0.01)
    assert loaded.tokenizer("fox").ids.tolist() == plain.tokenizer("fox").ids.tolist()


def test_tensors_that_do_not_fit_are_listed(folder: Path) -> None:
    state = random_networks().dit.state_dict()
    state["head.head.bias"] = torch.zeros(3)
    state["head.tail"] = state.pop("head.modulation")
    save_file(state, folder / DIT_FILE)
    with pytest.raises(ValueError, match=re.escape(str(folder / DIT_FILE))) as raised:
        load_networks(TINY, str(folder), "cpu", torch.float32)
    for problem in ("missing head.modulation", "unexpected head.tail", "head.head.bias: got [3], expected [64]"):
        assert problem in str(raised.value)


class Exploit:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple[type[AssertionError], tuple[str]]:
        return AssertionError, ("code in a checkpoint was run",)


def test_files_that_are_no_checkpoints_are_named(folder: Path) -> None:
    with (folder / VAE_FILE).open("wb") as file:
        pickle.dump(Exploit(), file)
    with pytest.raises(ValueError, match=re.escape(f"{folder / VAE_FILE}: cannot be read as tensors")):
        load_networks(TINY, str(folder), "cpu", torch.float32)
    (folder / VAE_FILE).unlink()
    with pytest.raises(ValueError, match=re.escape(f"{folder / VAE_FILE}: no such file")):
        load_networks(TINY, str(folder), "cpu", torch.float32)
    with pytest.raises(ValueError, match="weights: got 'nowhere', expected a folder"):
        load_networks(TINY, "nowhere", "cpu", torch.float32)
