# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters: merging as the reference does it, their files, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from longlive_serve.config import DIT, TEXT_ENCODER, ServeConfig
from longlive_serve.engines import build_engines
from longlive_serve.engines.torch_engine import TorchDiT
from longlive_serve.lora import Adapter, merged_state
from longlive_serve.weights import adapters_of, fingerprint, load_network
from longlive_serve.weights_folder import DIT_FILE, LONGLIVE_FOLDER, LORA_FILE
from tests.conftest import GOLDEN, golden
from tests.test_causal_dit import Forward, assert_close
from tests.weights_files import (
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
    assert_equal({name: merged[name] for name in known}, known)
    changed = {name for name, tensor in base.items() if not torch.equal(tensor, merged[name])}
    assert len(changed) == facts["facts"]["modules"]
    assert len(base) - len(changed) == facts["facts"]["unchanged_keys"]


def test_the_merged_network_computes_the_flow_of_the_reference(tmp_path: Path) -> None:
    facts, tensors = golden("lora_merge")
    forward = Forward()
    state = merged_state(forward.network.state_dict(), [Adapter(path=golden_adapter(tmp_path), alpha=facts["alpha"])])
    forward.network.load_state_dict(state)
    flow = forward(forward.tensors["x_block0"], forward.tensors["timesteps"][1], forward.tensors["prompt_embeds.p0"])
    assert_close(flow, tensors["flow_merged.t1"])
    assert_close(flow, tensors["flow.t1"])  # adapters beside the weights, as the reference runs them


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
    config: dict[str, Any] = {"lora": f"{adapter}=0.8, {tmp_path / 'other.pt'}", "lora_alpha": 16.0}
    state = loaded(DIT, write_wan(tmp_path / "weights"), **config)
    assert_equal(state, expected((lora_state(), 0.8 * 4), (other, 2.0)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_is_float32_and_rounded_once(tmp_path: Path, adapter: Path, dtype: torch.dtype) -> None:
    folder = write_wan(tmp_path / "weights", torch.bfloat16)
    base = cast(state_of(DIT), torch.bfloat16)
    state = loaded(DIT, folder, dtype, lora=str(adapter))
    assert_equal(state, cast(expected((lora_state(), 1.0), base=base), dtype))


def test_other_networks_have_no_adapters(tmp_path: Path, adapter: Path) -> None:
    folder = write_wan(tmp_path / "weights")
    assert_equal(loaded(TEXT_ENCODER, folder, lora=str(adapter)), state_of(TEXT_ENCODER))


def test_random_weights_take_adapters(adapter: Path) -> None:
    base = loaded(DIT, "random")
    assert_equal(loaded(DIT, "random", lora=str(adapter)), expected((lora_state(), 1.0), base=base))


def test_another_network_with_the_same_base_is_made_while_one_is_in_use(tmp_path: Path, adapter: Path) -> None:
    folder = str(write_wan(tmp_path / "weights"))
    config = ServeConfig(preset="tiny", weights=folder, lora=f"{adapter}=0.5", engine="torch", device="cpu")
    served = build_engines(config).dit
    assert isinstance(served, TorchDiT)
    adapters = [*adapters_of(config), Adapter(path=adapter, scale=-0.5)]
    again = load_network(DIT, TINY, folder, "cpu", torch.float32, adapters=adapters)
    plain = load_network(DIT, TINY, folder, "cpu", torch.float32, adapters=[])
    assert_equal(plain.state_dict(), state_of(DIT))
    assert_equal(served.network.state_dict(), expected((lora_state(), 0.5)))
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name])


# LongLive's own


def test_the_lora_beside_longlive_is_merged_and_this_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    write_reference(tmp_path, torch.float32)
    assert_equal(loaded(DIT, tmp_path), expected((lora_state(), 1.0)))
    path = tmp_path / LONGLIVE_FOLDER / LORA_FILE
    assert f"dit: {path} goes into 20 layers: rank 4, alpha as rank, scale 1" in caplog.messages
    assert_equal(load_network(DIT, TINY, str(tmp_path), "cpu", torch.float32).state_dict(), loaded(DIT, tmp_path))


def test_adapters_that_are_named_replace_it_and_this_is_said(
    tmp_path: Path, adapter: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_reference(tmp_path / "weights", torch.float32)
    own = folder / LONGLIVE_FOLDER / LORA_FILE
    assert_equal(loaded(DIT, folder, lora=f"{adapter}=2"), expected((lora_state(), 2.0)))
    assert f"dit: {own} is there, and left out, as `lora` names others; LongLive is both" in caplog.messages
    both = loaded(DIT, folder, lora=f"{own}, {adapter}=2")
    assert_equal(both, expected((lora_state(), 1.0), (lora_state(), 2.0)))
    assert_equal(loaded(DIT, folder, lora=f"{own}=0"), state_of(DIT))


def test_a_fingerprint_knows_the_adapters_and_their_scales(tmp_path: Path, adapter: Path) -> None:
    folder = str(write_wan(tmp_path / "weights"))
    seen = {fingerprint(DIT, folder), fingerprint(DIT, folder, use_ema=True)}
    for scale, alpha in ((1.0, 0.0), (0.5, 0.0), (1.0, 8.0)):
        adapters = [Adapter(path=adapter, scale=scale, alpha=alpha)]
        assert fingerprint(DIT, folder, adapters) == fingerprint(DIT, folder, adapters)
        assert fingerprint(TEXT_ENCODER, folder, adapters) == fingerprint(TEXT_ENCODER, folder)
        seen.add(fingerprint(DIT, folder, adapters))
    assert len(seen) == 5


# What is refused


def refusal(path: Path, state: Any) -> str:
    torch.save(state, path)
    with pytest.raises(ValueError) as raised:
        loaded(DIT, "random", lora=str(path))
    return str(raised.value)


def test_an_adapter_of_another_network_is_refused_with_the_layers_that_do_not_fit(tmp_path: Path) -> None:
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
        "blocks.7.ffn.0: the network has no such layer",
        "blocks.0.ffn.0: got lora_A [4, 1536] and lora_B [128, 4], expected them for a weight [128, 64]",
        "blocks.0.ffn.2: got lora_A [4, 128] and lora_B [64, 5], expected them for a weight [64, 128]",
        "head.head: got lora_A alone, expected lora_A and lora_B",
    ):
        assert f"\n  {problem}" in text


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"generator": {}, "step": 1}, "got generator, step, expected the key generator_lora, or tensors"),
        ({}, "expected the key generator_lora"),
        ({"x.lora_A.weight": torch.zeros(4, 4)}, "x: the network has no such layer"),
    ],
)
def test_a_file_that_is_no_adapter_is_refused(tmp_path: Path, state: Any, message: str) -> None:
    assert re.search(re.escape(f"{tmp_path / 'x.pt'}: "), text := refusal(tmp_path / "x.pt", state))
    assert message in text


def test_a_missing_adapter_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lora: {tmp_path / 'none.pt'}: no such file")):
        loaded(DIT, "random", lora=f"{tmp_path / 'none.pt'}=0.5")


def test_quantized_weights_take_no_adapters(tmp_path: Path, adapter: Path) -> None:
    folder = write_wan(tmp_path / "weights")
    (folder / DIT_FILE).rename(folder / "dit.quantized.safetensors")
    with pytest.raises(ValueError, match=r"got quantized weights with the adapters .*style.safetensors, expected none"):
        loaded(DIT, folder, lora=str(adapter))


# The settings


def test_settings_name_adapters_beside_their_file(tmp_path: Path) -> None:
    (tmp_path / "a=b").mkdir()
    path = tmp_path / "a=b" / "serve.toml"
    path.write_text(f'lora = "style.safetensors=0.8, ../other=1.pt ,{tmp_path / "x=y.pt"}"\nlora_alpha = 8\n')
    config = ServeConfig.from_toml(path)
    folder = path.parent
    assert config.adapters == (
        (str(folder / "style.safetensors"), 0.8),
        (str(folder / "../other=1.pt"), 1.0),
        (str(tmp_path / "x=y.pt"), 1.0),
    )
    assert config.lora_alpha == 8.0
    assert ServeConfig().adapters == ()


@pytest.mark.parametrize("lora", ["a.pt,", "=0.5", "a.pt=inf", "a.pt=nan, b.pt"])
def test_wrong_settings_are_refused(lora: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"lora: got {lora!r}, expected file names")):
        ServeConfig(lora=lora)
    with pytest.raises(ValueError, match="lora_alpha: got -1, expected 0 or more"):
        ServeConfig(lora_alpha=-1)
