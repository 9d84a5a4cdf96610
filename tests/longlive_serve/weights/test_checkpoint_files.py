# SPDX-License-Identifier: Apache-2.0
"""Files that are no checkpoints, or those of something else: each is refused in one message that says what to do."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import DIT, PRESETS, TEXT_ENCODER, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.weights.layouts import DIT_FILE, LONGLIVE_FILE, TEXT_ENCODER_FILE, VAE_FILE
from longlive_serve.weights.loader import load_model
from longlive_serve.weights.tensor_files import MOST_LISTED
from tests.support.live import start_server
from tests.support.weights_files import loaded, state_of, wan_text_names, write_longlive, write_sharded, write_wan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_wan(tmp_path / "weights")


def refusal(name: str, folder: Path | str, **settings: Any) -> str:
    with pytest.raises(ValueError) as raised:
        loaded(name, folder, **settings)
    return str(raised.value)


def cut_off(path: Path, share: float) -> int:
    size = int(path.stat().st_size * share)
    with path.open("r+b") as file:
        file.truncate(size)
    return size


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize(
    ("name", "file"), [(DIT, DIT_FILE), (VAE_DECODER, VAE_FILE), (TEXT_ENCODER, TEXT_ENCODER_FILE)]
)
def test_a_file_that_is_cut_off_is_named(folder: Path, name: str, file: str, share: float) -> None:
    size = cut_off(folder / file, share)
    text = refusal(name, folder)
    assert text.startswith(f"{folder / file}: cannot be read as tensors: ")
    assert text.lower().endswith("fetch it again")
    if share >= 0.5:
        assert f"it is cut off: got {size} bytes" in text


class Exploit:
    """What a malicious checkpoint would hold."""

    def __reduce__(self) -> tuple[type[AssertionError], tuple[str]]:
        return AssertionError, ("code in a checkpoint was run",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [None, 2, 4])
def test_code_in_a_file_is_not_run(folder: Path, protocol: int | None) -> None:
    state = {"generator": {"model.x": Exploit()}}
    with (folder / LONGLIVE_FILE).open("wb") as file:
        pickle.dump(state, file, protocol) if protocol else torch.save(state, file)
    text = refusal(DIT, folder)
    assert text.startswith(f"{folder / LONGLIVE_FILE}: cannot be read as tensors: it contains code or objects")
    assert ("exceptions.AssertionError" in text) == (protocol != 4)
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "it is a git-lfs pointer"),
        (b"<!DOCTYPE html><title>Sign in</title>", "it is a web page. Fetch the file itself"),
    ],
)
@pytest.mark.parametrize(("name", "file"), [(DIT, DIT_FILE), (VAE_DECODER, VAE_FILE)])
def test_what_came_in_place_of_a_file_is_told(folder: Path, name: str, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    assert message in refusal(name, folder)


def test_a_missing_file_or_folder_is_named(folder: Path) -> None:
    (folder / VAE_FILE).unlink()
    assert refusal(VAE_DECODER, folder) == (
        f"{folder / VAE_FILE}: no such file, nor vae_decoder.safetensors; expected the vae_decoder in one of them. "
        "Fetch it"
    )
    assert "use_ema: got true with random weights" in refusal(DIT, "random", use_ema=True)
    assert refusal(DIT, folder / "nowhere").startswith(f"weights: got '{folder / 'nowhere'}', expected a folder")


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / DIT_FILE).unlink()
    shards = write_sharded(state_of(DIT), folder / DIT_FILE, 3)
    index = folder / f"{DIT_FILE}.index.json"
    shards[1].unlink()
    assert refusal(DIT, folder) == (
        f"{index}: got 2 of 3 shards, missing {shards[1].name}: expected all of them in the same folder. Fetch those"
    )
    save_file({"head.head.bias": torch.zeros(64)}, shards[1])  # of another download
    assert f"{index}: its shards lack" in refusal(DIT, folder)
    for content in ("", "{}", json.dumps({"weight_map": {"a": "../a.safetensors"}})):
        index.write_text(content)
        assert f"{index}: not an index of shards" in refusal(DIT, folder)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    shards = write_sharded(state_of(DIT), tmp_path / "transformer" / DIT_FILE, 2)
    index = tmp_path / "transformer" / f"{DIT_FILE}.index.json"
    index.unlink()
    assert all(shard.exists() for shard in shards)
    assert refusal(DIT, tmp_path).startswith(f"{index}: no such file, but shards")


def test_a_shard_that_is_cut_off_is_named(folder: Path) -> None:
    (folder / DIT_FILE).unlink()
    shards = write_sharded(state_of(DIT), folder / DIT_FILE, 3)
    cut_off(shards[2], 0.9)
    assert refusal(DIT, folder).startswith(f"{shards[2]}: cannot be read as tensors: it is cut off")


def test_tensors_that_do_not_fit_are_listed_with_what_was_expected(folder: Path) -> None:
    state = state_of(DIT)
    state["head.head.bias"] = torch.zeros(3)
    state["head.head.weight"] = torch.zeros(64, 64, dtype=torch.int32)
    state["head.tail"] = state.pop("head.modulation")
    save_file(state, folder / DIT_FILE)
    assert refusal(DIT, folder) == (
        f"{folder / DIT_FILE}: does not fit the model:\n"
        "  missing head.modulation\n"
        "  unexpected head.tail\n"
        "  head.head.bias: got [3], expected [64]\n"
        "  head.head.weight: got torch.int32, expected a float dtype\n"
        "Expected the dit of preset tiny: give another file or another preset"
    )


def test_of_very_many_problems_the_first_are_listed(folder: Path) -> None:
    save_file({f"x{number}": torch.zeros(1) for number in range(70)}, folder / DIT_FILE)
    text = refusal(DIT, folder)
    assert f"and {len(state_of(DIT)) - MOST_LISTED} more" in text
    assert f"and {70 - MOST_LISTED} more" in text
    assert len(text.splitlines()) == 2 * MOST_LISTED + 4
    with pytest.raises(ValueError, match=r"ffn.0.weight: got \[128, 64\], expected \[8960, 1536\]"):
        load_model(DIT, PRESETS["longlive-1.3b"], str(write_wan(folder)), "cpu", torch.float32)


def test_the_text_encoder_is_told_of_in_the_names_of_its_file(folder: Path) -> None:
    state = wan_text_names()
    state["blocks.0.attn.x.weight"] = state.pop("blocks.0.attn.q.weight")
    state["norm.weight"] = torch.zeros(5)
    torch.save(state, folder / TEXT_ENCODER_FILE)
    text = refusal(TEXT_ENCODER, folder)
    for problem in ("missing blocks.0.attn.q.weight", "unexpected blocks.0.attn.x.weight", "norm.weight: got [5]"):
        assert f"\n  {problem}" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"critic": {}, "step": 5}, "got critic, step, expected the key generator, or the key model, or only tensors"),
        ([torch.zeros(1)], "got list, expected the key generator"),
        ({"generator": {"model.x": 5}}, "expected the key generator, or the key model, or only tensors by name"),
        ({}, "expected the key generator"),
    ],
)
def test_a_torch_file_of_something_else_is_told(folder: Path, content: Any, message: str) -> None:
    torch.save(content, folder / LONGLIVE_FILE)
    assert re.search(re.escape(message), refusal(DIT, folder))


def test_nothing_is_built_of_a_folder_with_one_wrong_file(folder: Path) -> None:
    write_longlive(folder / LONGLIVE_FILE)
    cut_off(folder / VAE_FILE, 0.7)
    with pytest.raises(ValueError, match=re.escape(f"{folder / VAE_FILE}: cannot be read as tensors: it is cut off")):
        build_backends(ServeConfig(preset="tiny", weights=str(folder), backend="torch", device="cpu"))


def test_a_server_with_a_truncated_file_refuses_to_start_and_says_why(folder: Path, tmp_path: Path) -> None:
    size = cut_off(folder / VAE_FILE, 0.7)
    server = start_server(tmp_path, weights=str(folder))
    with pytest.raises(ServerStartError) as raised, server:
        pass
    expected = f"{folder / VAE_FILE}: cannot be read as tensors: it is cut off: got {size} bytes"
    assert "before the model was ready" in str(raised.value)
    assert expected in str(raised.value)
    print(raised.value)
