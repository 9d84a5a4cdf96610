# SPDX-License-Identifier: Apache-2.0
"""`python -m export.convert`: what comes out loads as what went in; it goes on, and overwrites nothing."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from export import convert as command
from export.convert import convert, parts_of, work
from export.output_folder import MADE_BY, RECORD
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import DIT, MODELS, TINY_DECODER
from longlive_serve.config.serve_config import Adapter, ServeConfig
from longlive_serve.weights.checkpoint import Checkpoint, build
from longlive_serve.weights.layouts import LONGLIVE_FILE, LONGLIVE_FOLDER, LORA_FILE, TINY_DECODER_FILE
from longlive_serve.weights.loader import ModelLoader
from longlive_serve.weights.tensor_files import sha256
from quantization.quantize import quantize
from tests.support.weights_files import TINY, assert_equal, loaded, lora_state, state_of, write_reference, write_wan

NAMES = [f"{name}.safetensors" for name in MODELS]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_reference(tmp_path / "source")


def converted(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> int:
    config = ServeConfig(preset="tiny", weights=str(source), **settings)
    loader = ModelLoader.from_config(config)
    return convert(config, loader, parts_of(loader), dtype, out)


def refusal(source: Path, out: Path, **settings: Any) -> str:
    with pytest.raises(ValueError) as raised:
        converted(source, out, **settings)
    return str(raised.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_what_comes_out_loads_as_the_same_models(source: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    out = tmp_path / "out"
    assert converted(source, out, dtype) == 0
    assert sorted(path.name for path in out.iterdir()) == sorted([*NAMES, "tokenizer", RECORD])
    for name in MODELS:
        assert_equal(loaded(name, out, dtype), loaded(name, source, dtype))
        assert {tensor.dtype for tensor in load_file(out / f"{name}.safetensors").values()} == {dtype}
    ids = [ModelLoader.open(TINY, str(folder)).load_tokenizer()("fox").ids for folder in (source, out)]
    assert torch.equal(*ids)


def test_an_engine_makes_the_same_of_both(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", torch.float32)
    embeds = []
    for folder in (source, tmp_path / "out"):
        backends = build_backends(ServeConfig(preset="tiny", weights=str(folder), backend="torch", device="cpu"))
        embeds.append(backends.text_encoder.encode("a red fox").embeds)
    assert torch.equal(*embeds)


def test_the_record_says_what_everything_was_made_of(source: Path, tmp_path: Path) -> None:
    own = source / LONGLIVE_FOLDER / LORA_FILE
    save_file(lora_state(seed=2, rank=2), tmp_path / "style.safetensors")
    style = tmp_path / "style.safetensors"
    converted(source, tmp_path / "out", lora=(Adapter(path=own), Adapter(path=style, scale=0.5)))
    record = json.loads((tmp_path / "out" / RECORD).read_text(encoding="utf-8"))
    base = source / LONGLIVE_FOLDER / LONGLIVE_FILE
    assert record["files"]["dit.safetensors"]["sources"] == [
        {"file": f"{LONGLIVE_FOLDER}/{LONGLIVE_FILE}", "bytes": base.stat().st_size, "sha256": sha256(base)}
    ]
    assert record["lora"] == [
        {"file": LORA_FILE, "sha256": sha256(own), "scale": 1.0, "alpha": 4.0, "rank": 4},
        {"file": "style.safetensors", "sha256": sha256(style), "scale": 0.5, "alpha": 2.0, "rank": 2},
    ]
    assert (record["preset"], record["dtype"], record["use_ema"]) == ("tiny", "bfloat16", False)
    assert record["sizes"]["dit"]["dim"] == TINY.dit.dim
    assert record["versions"]["torch"] == version("torch")  # `torch.__version__` may name the build as well
    assert str(tmp_path) not in (tmp_path / "out" / RECORD).read_text(encoding="utf-8")


def test_averaged_weights_and_a_tiny_decoder_are_converted(source: Path, tmp_path: Path) -> None:
    state = build(TINY_DECODER, TINY).state_dict()
    torch.save(state | {"encoder.0.weight": torch.zeros(1)}, source / TINY_DECODER_FILE)
    out = tmp_path / "out"
    converted(source, out, torch.float32, use_ema=True)
    assert_equal(loaded(TINY_DECODER, out), state)
    assert_equal(loaded(DIT, out, use_ema=True), loaded(DIT, source, use_ema=True))
    assert_equal(loaded(DIT, out), loaded(DIT, source, use_ema=True))
    converted(source, tmp_path / "other", torch.float32)
    with pytest.raises(ValueError, match="got no EMA weights, but use_ema is set"):
        loaded(DIT, tmp_path / "other", use_ema=True)


def test_an_adapter_is_not_merged_twice(source: Path, tmp_path: Path) -> None:
    own, out = source / LONGLIVE_FOLDER / LORA_FILE, tmp_path / "out"
    converted(source, out)
    expected = f"{own}: is already merged into {out / 'dit.safetensors'}; remove it from `lora`"
    with pytest.raises(ValueError, match=re.escape(expected)):
        loaded(DIT, out, lora=(Adapter(path=own),))
    assert expected in refusal(out, tmp_path / "again", lora=(Adapter(path=own),))
    save_file(lora_state(seed=2), tmp_path / "style.safetensors")
    converted(out, tmp_path / "again", lora=(Adapter(path=tmp_path / "style.safetensors"),))
    record = json.loads((tmp_path / "again" / RECORD).read_text(encoding="utf-8"))
    assert [lora["file"] for lora in record["lora"]] == [LORA_FILE, "style.safetensors"]


# Going on


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.is_file()}


def test_what_is_there_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(source, out)
    before = stamps(out)
    assert converted(source, out) == 4
    assert stamps(out) == before


def test_an_interrupted_conversion_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tensors = tmp_path / "out", Checkpoint.tensors

    def broken(checkpoint: Checkpoint) -> Any:
        for number, item in enumerate(tensors(checkpoint)):
            if checkpoint.name == DIT and number == 5:
                raise KeyboardInterrupt
            yield item

    config = ServeConfig(preset="tiny", weights=str(source))
    loader = ModelLoader.from_config(config)
    parts = parts_of(loader)
    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "tensors", broken)
        with pytest.raises(KeyboardInterrupt):
            convert(config, loader, parts, torch.bfloat16, out)
    assert sorted(stamps(out)) == ["dit.safetensors.partial", "text_encoder.safetensors"]
    before = stamps(out)["text_encoder.safetensors"]
    assert converted(source, out) == 1
    assert sorted(stamps(out)) == sorted([*NAMES, RECORD])
    assert stamps(out)["text_encoder.safetensors"] == before
    for name in MODELS:
        assert_equal(loaded(name, out, torch.bfloat16), loaded(name, source, torch.bfloat16))


def test_progress_comes_to_the_end(source: Path, tmp_path: Path) -> None:
    config = ServeConfig(preset="tiny", weights=str(source))
    loader, out = ModelLoader.from_config(config), tmp_path / "out"
    parts = parts_of(loader)
    done: list[int] = []
    for times in (1, 2):
        convert(config, loader, parts, torch.bfloat16, out, lambda what, count: done.append(count))
        assert sum(done) == times * work(parts, torch.bfloat16)


def test_no_more_than_a_tensor_is_held(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, before = [], Tensor.to

    def to(tensor: Tensor, *args: Any) -> Tensor:
        held.append(tensor.numel())
        return before(tensor, *args)

    monkeypatch.setattr(Tensor, "to", to)
    converted(source, tmp_path / "out")
    assert max(held) == max(tensor.numel() for name in MODELS for tensor in state_of(name).values())


# What is refused


def test_files_of_something_else_are_not_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(source, out)
    before = stamps(out)
    other = "made from other files or with other settings, expected none. Choose another --out, or remove it"
    assert other in refusal(source, out, use_ema=True)
    own = Adapter(path=source / LONGLIVE_FOLDER / LORA_FILE, alpha=2.0)
    assert f"{out / 'dit.safetensors'}: got a file {other}" == refusal(source, out, lora=(own,))
    with pytest.raises(ValueError, match="made from other files"):
        converted(source, out, torch.float32)
    (out / "dit.safetensors").write_bytes(b"mine")
    assert f"{out / 'dit.safetensors'}: got a file not written by {MADE_BY}" in refusal(source, out)
    (out / "dit.safetensors").unlink()
    (out / "tokenizer" / "extra").touch()
    assert f"{out / 'tokenizer'}: got other files than in" in refusal(source, out)
    (out / RECORD).write_text('{"model_type": "t2v"}')
    assert f"{out / RECORD}: got a file not written by {MADE_BY}" in refusal(source, out)
    del before["dit.safetensors"], before[RECORD]
    assert before.items() <= stamps(out).items()


def test_a_changed_source_is_noticed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted(source, out)
    torch.save({"generator_lora": lora_state(seed=9)}, source / LONGLIVE_FOLDER / LORA_FILE)
    assert f"{out / 'dit.safetensors'}: got a file made from other files" in refusal(source, out)


def test_a_source_that_does_not_fit_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    torch.save({"generator_lora": {"x.lora_A.weight": torch.zeros(2, 2)}}, source / LONGLIVE_FOLDER / LORA_FILE)
    assert "not an adapter of this DiT" in refusal(source, out)
    (source / LONGLIVE_FOLDER / LONGLIVE_FILE).unlink()
    assert f"{LONGLIVE_FILE}: no such file" in refusal(source, out)
    assert not out.exists()


def test_wrong_folders_are_refused(source: Path, tmp_path: Path) -> None:
    assert "the source folder; expected another one" in refusal(source, source)
    (tmp_path / "file").touch()
    assert "a file; expected a folder" in refusal(source, tmp_path / "file")
    with pytest.raises(ValueError, match="got 'random', expected a folder of weights to convert"):
        parts_of(ModelLoader.from_config(ServeConfig(preset="tiny")))
    flat = write_wan(tmp_path / "flat")
    (flat / "diffusion_pytorch_model.safetensors").rename(flat / "dit.quantized.safetensors")
    assert "got quantized weights, expected others: convert first, then quantize" in refusal(flat, tmp_path / "out")


def test_quantization_asks_for_a_converted_folder(source: Path, tmp_path: Path) -> None:
    config = ServeConfig(preset="tiny", weights=str(source), device="cpu")
    with pytest.raises(ValueError, match="then quantize its output"):
        quantize(config, ["int8"], ["a fox"], tmp_path / "int8")
    converted(source, tmp_path / "out")
    config = ServeConfig(preset="tiny", weights=str(tmp_path / "out"), device="cpu")
    quantize(config, ["int8-vae"], ["a fox"], tmp_path / "int8")
    for name in (DIT, "text_encoder"):
        assert_equal(loaded(name, tmp_path / "int8"), loaded(name, tmp_path / "out"))
    assert ModelLoader.open(TINY, str(tmp_path / "int8")).load_tokenizer()("fox").length == 4
    with safe_open(tmp_path / "int8" / "vae_decoder.quantized.safetensors", "pt") as file:
        assert file.metadata()["recipe"] == "int8-vae"


# The command line


def test_the_command_line_converts_and_says_what_it_did(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = ["--preset", "tiny", "--weights", str(source), "--out", str(out), "--dtype", "float32"]
    assert command.main(arguments) == 0
    said = capsys.readouterr()
    assert f"{out / 'dit.safetensors'}\n" in said.out
    assert "all files are new" in said.out
    assert f'weights = "{out}"' in said.out
    assert command.main(arguments) == 0
    assert "4 already existed" in capsys.readouterr().out
    own = source / LONGLIVE_FOLDER / LORA_FILE
    assert command.main([*arguments, "--lora", f"{own}=0.5", f"{own}"]) == 2
    assert "convert: " in (said := capsys.readouterr()).err
    assert "Traceback" not in said.err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert "python -m export.convert --weights FOLDER --out weights/longlive\n" in capsys.readouterr().out
