# SPDX-License-Identifier: Apache-2.0
"""Prompt cleaning, the tokenizer and the umT5 encoder against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
import torch
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from longlive_serve.config.presets import PRESETS, TextEncoderConfig
from longlive_serve.models.text_encoder import END_ID, PAD_ID, TextEncoder, Tokenizer, clean_prompt, wan_names
from longlive_serve.weights.checkpoint import state_dict_mismatches
from tests.support.cases import golden
from tests.support.tolerance import Float64, assert_reference

pytestmark = pytest.mark.numeric

FACTS, TENSORS = golden("t5_tiny")
WAN_STATE = {k.removeprefix("state."): v for k, v in TENSORS.items() if k.startswith("state.")}
LAYERS = FACTS["config"]["num_layers"]


def with_our_names(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    names = wan_names(layers)
    return {names.get(name, name): tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    config = FACTS["config"]
    model = TextEncoder(
        TextEncoderConfig(
            vocab_size=config["vocab"],
            dim=config["dim"],
            ffn_dim=config["dim_ffn"],
            num_heads=config["num_heads"],
            num_layers=config["num_layers"],
            head_dim=config["dim_attn"] // config["num_heads"],
            num_buckets=config["num_buckets"],
        )
    )
    model.load_state_dict(with_our_names(WAN_STATE, LAYERS))
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(("text", "cleaned"), golden("text_clean")[0]["pairs"])
def test_text_is_cleaned_as_the_reference_does(text: str, cleaned: str) -> None:
    assert clean_prompt(text) == cleaned


def test_embeddings_equal_the_reference_and_are_zero_beyond_the_prompt(encoder: TextEncoder) -> None:
    embeddings = encoder(TENSORS["ids"], TENSORS["mask"])
    with Float64():
        exact = encoder(TENSORS["ids"], TENSORS["mask"])
    assert_reference(embeddings, TENSORS["prompt_embeds"], exact)
    for row, length in zip(embeddings, FACTS["lens"], strict=True):
        assert row[:length].any(dim=1).all()
        assert not row[length:].any()


def test_what_stands_in_the_padding_does_not_matter(encoder: TextEncoder) -> None:
    ids = TENSORS["ids"].masked_fill(TENSORS["mask"] == 0, 7)
    assert torch.equal(encoder(ids, TENSORS["mask"]), encoder(TENSORS["ids"], TENSORS["mask"]))


def test_a_short_prompt_is_padded() -> None:
    prompt = Tokenizer(8, None)("  cat ")
    assert prompt.ids.tolist() == [[*(byte + 3 for byte in b"cat"), END_ID, *[PAD_ID] * 4]]
    assert prompt.mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]]
    assert (prompt.length, prompt.full_length) == (4, 4)
    assert prompt.ids.dtype == prompt.mask.dtype == torch.int64


@pytest.mark.parametrize("length", [0, 1, 14, 15, 16, 100])
def test_truncation_keeps_the_end_token_and_tells_the_full_length(length: int) -> None:
    prompt = Tokenizer(16, None)("x" * length)
    own = ByT5Tokenizer()("x" * length, padding="max_length", truncation=True, max_length=16, return_tensors="pt")
    assert torch.equal(prompt.ids, own["input_ids"])
    assert torch.equal(prompt.mask, own["attention_mask"])
    assert prompt.ids[0, prompt.length - 1] == END_ID
    assert (prompt.length, prompt.full_length) == (min(length + 1, 16), length + 1)


def test_a_tokenizer_of_bytes_knows_every_word() -> None:
    tokenizer = Tokenizer(16, None)
    assert tokenizer("qzx \u00fc").unknown == ()
    assert tokenizer.known_words() == ()  # more than a person would read


def test_a_tokenizer_is_read_from_its_folder(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert torch.equal(Tokenizer(16, tmp_path)("a cat").ids, Tokenizer(16, None)("a cat").ids)


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the tokenizer folder"):
        Tokenizer(16, tmp_path / "absent")
    with pytest.raises(ValueError, match="expected the tokenizer folder"):
        Tokenizer(16, tmp_path)


def test_a_tokenizer_with_other_special_ids_is_an_error(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "<pad>": 1}))
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"as \(1, 0\), expected \(0, 1\)"):
        Tokenizer(16, tmp_path)


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    config = PRESETS["longlive-1.3b"].text_encoder
    with torch.device("meta"):
        model = TextEncoder(config)
        checkpoint = {name: torch.empty(shape) for name, shape in golden("key_inventory")[0]["t5"]["tensors"].items()}
    mapped = with_our_names(checkpoint, config.num_layers)
    assert len(mapped) == len(checkpoint)
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_missing_and_unknown_names_are_listed_as_the_file_has_them(encoder: TextEncoder) -> None:
    state = {**WAN_STATE, "blocks.7.norm1.weight": torch.ones(1), "surprise": torch.ones(1)}
    del state["norm.weight"], state["blocks.1.ffn.fc2.weight"]
    shown = {ours: wan for wan, ours in wan_names(LAYERS).items()}
    missing, unexpected = state_dict_mismatches(with_our_names(state, LAYERS), encoder.state_dict(), shown)
    assert {*missing.split("\n  ")} == {"missing blocks.1.ffn.fc2.weight", "missing norm.weight"}
    assert {*unexpected.split("\n  ")} == {"unexpected blocks.7.norm1.weight", "unexpected surprise"}
