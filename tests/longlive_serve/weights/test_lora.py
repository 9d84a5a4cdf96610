# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: merging as the reference does it, their files, and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import DIT, TEXT_ENCODER
from longlive_serve.config.serve_config import Adapter, ServeConfig
from longlive_serve.weights.layouts import DIT_FILE, LONGLIVE_FOLDER, LORA_FILE
from longlive_serve.weights.loader import ModelLoader, load_model
from longlive_serve.weights.lora import merged_state
from tests.longlive_serve.models.test_causal_dit import Both
from tests.support.cases import GOLDEN, golden
from tests.support.tolerance import assert_reference, error, gamma
from tests.support.weights_files import (
    TINY,
    State,
    assert_equal,
    cast,
    loaded,
    lora_state,
    state_of,
    write_reference,
    write_wan,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_file(lora_state(), tmp_path / "style.safetensors")
    return tmp_path / "style.safetensors"


def expected(*adapters: tuple[State, float], base: State | None = None) -> State:
    """The DiT with adapters, each with its scale * alpha / rank."""
    state = base or state_of(DIT)
    for lora, factor in adapters:
        for name in [name for name in lora if ".lora_A." in name]:
            target = name.removeprefix("base_model.model.").replace(".lora_A.", ".")
            delta = lora[name.replace("lora_A", "lora_B")].float() @ lora[name].float()
            state[target] = state[target].float() + delta * factor
    return state


# The reference's numbers


def golden_adapter(folder: Path) -> Path:
    tensors = golden("lora_merge")[1]
    lora = {key.removeprefix("lora."): tensor for key, tensor in tensors.items() if key.startswith("lora.")}
    torch.save({"generator_lora": lora}, folder / LORA_FILE)
    return folder / LORA_FILE


def test_a_merge_gives_the_weights_of_the_reference(tmp_path: Path) -> None:
    facts, tensors = golden("lora_merge")
    base = golden("dit_tiny_weights")[1]
    merged = merged_state(base, [Adapter(path=golden_adapter(tmp_path), alpha=facts["alpha"])])
    known = {key.removeprefix("merged."): tensor for key, tensor in tensors.items() if key.startswith("merged.")}
    assert len(known) == 3
    for name, tensor in known.items():  # a sum of so many products as the rank says, and the weight
        assert error(merged[name], tensor) <= gamma(facts["rank"] + 1), name
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert len(changed) == facts["facts"]["modules"]
    assert len(base) - len(changed) == facts["facts"]["unchanged_keys"]


def test_the_merged_model_computes_the_flow_of_the_reference(tmp_path: Path) -> None:
    facts, tensors = golden("lora_merge")
    both, adapter = Both(), Adapter(path=golden_adapter(tmp_path), alpha=facts["alpha"])
    state = merged_state(golden("dit_tiny_weights")[1], [adapter])
    for forward in both.forwards:
        forward.model.load_state_dict(state)
    given = both.tensors
    flow, exact = both(given["x_block0"], given["timesteps"][1], given["prompt_embeds.p0"])
    assert_reference(flow, tensors["flow_merged.t1"], exact)
    assert_reference(flow, tensors["flow.t1"], exact)  # adapters beside the weights, as the reference runs them


def test_the_published_file_format_is_read() -> None:
    path = GOLDEN / "lora_format_tiny.pt"
    lora = torch.load(path, weights_only=True)["generator_lora"]
    base = golden("dit_tiny_weights")[1]
    assert_equal(merged_state(base, [Adapter(path=path)]), expected((lora, 1.0), base=dict(base)))


# Files, scales, alpha


@pytest.mark.parametrize("prefix", ["base_model.model.", "", "diffusion_model."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_adapters_come_in_both_formats(tmp_path: Path, suffix: str, prefix: str) -> None:
    path, state = tmp_path / f"style{suffix}", lora_state(prefix=prefix)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert_equal(merged_state(state_of(DIT), [Adapter(path=path)]), expected((lora_state(), 1.0)))


def test_several_adapters_add_up_each_with_its_scale_and_rank(tmp_path: Path, adapter: Path) -> None:
    other = lora_state(seed=2, rank=8)
    torch.save({"generator_lora": other}, tmp_path / "other.pt")
    lora = (Adapter(path=adapter, scale=0.8, alpha=16.0), Adapter(path=tmp_path / "other.pt", alpha=8.0))
    state = loaded(DIT, write_wan(tmp_path / "weights"), lora=lora)
    assert_equal(state, expected((lora_state(), 0.8 * 4), (other, 1.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_is_float32_and_rounded_once(tmp_path: Path, adapter: Path, dtype: torch.dtype) -> None:
    folder = write_wan(tmp_path / "weights", torch.bfloat16)
    base = cast(state_of(DIT), torch.bfloat16)
    state = loaded(DIT, folder, dtype, lora=(Adapter(path=adapter),))
    assert_equal(state, cast(expected((lora_state(), 1.0), base=base), dtype))


def test_other_models_have_no_adapters(tmp_path: Path, adapter: Path) -> None:
    folder = write_wan(tmp_path / "weights")
    assert_equal(loaded(TEXT_ENCODER, folder, lora=(Adapter(path=adapter),)), state_of(TEXT_ENCODER))


def test_random_weights_take_adapters(adapter: Path) -> None:
    base = loaded(DIT, "random")
    assert_equal(loaded(DIT, "random", lora=(Adapter(path=adapter),)), expected((lora_state(), 1.0), base=base))


def test_another_model_with_the_same_base_is_made_while_one_is_in_use(tmp_path: Path, adapter: Path) -> None:
    folder = str(write_wan(tmp_path / "weights"))
    config = ServeConfig(
        preset="tiny", weights=folder, lora=(Adapter(path=adapter, scale=0.5),), backend="torch", device="cpu"
    )
    served = build_backends(config).dit
    assert isinstance(served, TorchDiT)
    loader = ModelLoader.from_config(config)
    both = dataclasses.replace(loader, adapters=[*loader.adapters, Adapter(path=adapter, scale=-0.5)])
    again = both.load_model(DIT, "cpu", torch.float32)
    plain = load_model(DIT, TINY, folder, "cpu", torch.float32)
    assert_equal(plain.state_dict(), state_of(DIT))
    assert_equal(served.model.state_dict(), expected((lora_state(), 0.5)))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


# LongLive's own


def test_the_lora_beside_longlive_is_merged_and_this_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_reference(tmp_path, torch.float32)
    assert_equal(loaded(DIT, tmp_path), expected((lora_state(), 1.0)))
    path = tmp_path / LONGLIVE_FOLDER / LORA_FILE
    assert f"dit: merging {path} into 20 layers: rank 4, alpha as rank, scale 1" in caplog.messages
    assert_equal(load_model(DIT, TINY, str(tmp_path), "cpu", torch.float32).state_dict(), loaded(DIT, tmp_path))


def test_adapters_that_are_named_replace_it_and_this_is_said(
    tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_reference(tmp_path / "weights", torch.float32)
    own = folder / LONGLIVE_FOLDER / LORA_FILE
    assert_equal(loaded(DIT, folder, lora=(Adapter(path=adapter, scale=2.0),)), expected((lora_state(), 2.0)))
    assert (
        f"dit: {own} is not merged, because `lora` names other adapters; LongLive consists of base and adapter"
        in caplog.messages
    )
    both = loaded(DIT, folder, lora=(Adapter(path=own), Adapter(path=adapter, scale=2.0)))
    assert_equal(both, expected((lora_state(), 1.0), (lora_state(), 2.0)))
    assert_equal(loaded(DIT, folder, lora=(Adapter(path=own, scale=0.0),)), state_of(DIT))


def test_a_fingerprint_knows_the_adapters_and_their_scales(tmp_path: Path, adapter: Path) -> None:
    folder = str(write_wan(tmp_path / "weights"))
    plain = ModelLoader.open(TINY, folder)
    seen = {plain.fingerprint(DIT), ModelLoader.open(TINY, folder, use_ema=True).fingerprint(DIT)}
    for scale, alpha in ((1.0, 0.0), (0.5, 0.0), (1.0, 8.0)):
        adapters = [Adapter(path=adapter, scale=scale, alpha=alpha)]
        loader = ModelLoader.open(TINY, folder, adapters)
        assert loader.fingerprint(DIT) == ModelLoader.open(TINY, folder, adapters).fingerprint(DIT)
        assert loader.fingerprint(TEXT_ENCODER) == plain.fingerprint(TEXT_ENCODER)
        seen.add(loader.fingerprint(DIT))
    assert len(seen) == 5


# What is refused


def refusal(path: Path, state: Any) -> str:
    torch.save(state, path)
    with pytest.raises(ValueError) as raised:
        loaded(DIT, "random", lora=(Adapter(path=path),))
    return str(raised.value)


def test_an_adapter_of_another_model_is_refused_with_the_layers_that_do_not_fit(tmp_path: Path) -> None:
    state = lora_state()
    state["base_model.model.blocks.7.ffn.0.lora_A.weight"] = torch.zeros(4, 64)
    state["base_model.model.blocks.7.ffn.0.lora_B.weight"] = torch.zeros(128, 4)
    state["base_model.model.blocks.0.ffn.0.lora_A.weight"] = torch.zeros(4, 1536)
    state["base_model.model.blocks.0.ffn.2.lora_B.weight"] = torch.zeros(64, 5)
    state["base_model.model.blocks.0.ffn.2.bias"] = torch.zeros(64)
    state["base_model.model.head.head.lora_A.weight"] = torch.zeros(4, 64)
    text = refusal(tmp_path / "other.pt", {"generator_lora": state})
    assert text.startswith(f"{tmp_path / 'other.pt'}: not an adapter of this DiT:\n")
    for problem in (
        "unexpected base_model.model.blocks.0.ffn.2.bias",
        "blocks.7.ffn.0: the model has no such layer",
        "blocks.0.ffn.0: got lora_A [4, 1536] and lora_B [128, 4], expected them for a weight [128, 64]",
        "blocks.0.ffn.2: got lora_A [4, 128] and lora_B [64, 5], expected them for a weight [64, 128]",
        "head.head: got lora_A alone, expected lora_A and lora_B",
    ):
        assert f"\n  {problem}" in text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"generator": {}, "step": 1}, "got generator, step, expected the key generator_lora, or only tensors"),
        ({}, "expected the key generator_lora"),
        ({"x.lora_A.weight": torch.zeros(4, 4)}, "x: the model has no such layer"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    assert re.search(re.escape(f"{tmp_path / 'x.pt'}: "), text := refusal(tmp_path / "x.pt", state))
    assert message in text


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lora: {tmp_path / 'none.pt'}: no such file")):
        loaded(DIT, "random", lora=(Adapter(path=tmp_path / "none.pt", scale=0.5),))


def test_quantized_weights_take_no_adapters(tmp_path: Path, adapter: Path) -> None:
    folder = write_wan(tmp_path / "weights")
    (folder / DIT_FILE).rename(folder / "dit.quantized.safetensors")
    with pytest.raises(ValueError, match=r"got quantized weights with the adapters .*style.safetensors, expected none"):
        loaded(DIT, folder, lora=(Adapter(path=adapter),))


# The settings


def test_settings_name_adapters_beside_their_file(tmp_path: Path) -> None:
    folder = tmp_path / "a=b, (c)"
    folder.mkdir()
    path = folder / "serve.toml"
    path.write_text(
        f"""slots = 3
[[lora]]
path = "style, of 'two'.safetensors"
scale = 0.8
alpha = 16
[[lora]]
path = '{tmp_path / "x=y.pt"}'
""",
        encoding="utf-8",
    )
    config = ServeConfig.from_toml(path)
    assert config.lora == (
        Adapter(path=folder / "style, of 'two'.safetensors", scale=0.8, alpha=16.0),
        Adapter(path=tmp_path / "x=y.pt"),
    )
    assert ServeConfig().lora == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('lora = "a.pt=0.5, b.pt"', "lora: got 'a.pt=0.5, b.pt', expected one or more tables: [[lora]] path = "),
        ('[lora]\npath = "a.pt"', "lora: got {'path': 'a.pt'}, expected one or more tables"),
        ('lora = ["a.pt"]', "lora, table 1 of 1: got 'a.pt', expected a table"),
        ("[[lora]]\nscale = 1", "lora, table 1 of 1: path: got None, expected the name of a file"),
        ('[[lora]]\npath = ""', "lora, table 1 of 1: path: got '', expected the name of a file"),
        (
            '[[lora]]\npath = "a.pt"\n[[lora]]\npath = "b.pt"\nscale = inf',
            "table 2 of 2: scale: got inf, expected",
        ),
        ('[[lora]]\npath = "a.pt"\nscale = "1"', "scale: got '1', expected float"),
        ('[[lora]]\npath = "a.pt"\nalpha = -1', "alpha: got -1.0, expected 0 or more"),
        ('[[lora]]\npath = "a.pt"\nrank = 4', "got unknown key 'rank', expected some of ['alpha', 'path', 'scale']"),
    ],
)
def test_wrong_tables_name_the_table_and_the_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        ServeConfig.from_toml(path)
