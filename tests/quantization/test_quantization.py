# SPDX-License-Identifier: Apache-2.0
"""Recipes, calibration, and the folder that `quantization.quantize` writes. The layers: test_quantized.py."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from export.to_onnx import export, source_of_config
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import DIT, MODELS, PRESETS, TEXT_ENCODER, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.quantization.int8_fp8_layers import install, quantized_layers
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.weights.loader import ModelLoader, load_model
from longlive_serve.weights.tensor_files import sha256
from quantization import quantize as command
from quantization.calibration import FILE, calibration_session
from quantization.checkpoint import InputStats, quantized_state
from quantization.flow_errors import ComparedDiTs, relative_error, with_block
from quantization.quantize import quantize
from quantization.recipes import RECIPES, Format, combine_recipes, formats_of_layers
from quantization.report import markdown, plot
from quantization.rollouts import bounded
from quantization.sizes import bytes_of
from tests.support.shallow import shallow
from training.quality.__main__ import SHIPPED

pytestmark = pytest.mark.numeric

DEMO = ServeConfig(preset="demo", weights=str(SHIPPED), backend="torch", device="cpu", slots=1)
TINY = ServeConfig(preset="tiny", backend="torch", device="cpu", slots=1)
PROMPTS = [
    "A red circle drifts right over a black background.",
    "A single blue cross slowly moves up on a gray background.",
]
INT8 = Format(dtype=torch.int8)


def made(folder: Path, recipes: Sequence[str], prompts: list[str], **how: Any) -> Path:
    quantize(DEMO, recipes, prompts, folder, **how)
    return folder


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in INT8, after two sessions."""
    return made(tmp_path_factory.mktemp("int8"), ["int8"], PROMPTS)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in FP8 and its decoder in INT8, after one session."""
    return made(tmp_path_factory.mktemp("fp8"), ["fp8", "int8-vae"], PROMPTS[:1])


def first_chunks(weights: Path, dtype: str = "float32") -> tuple[Tensor, Tensor]:
    """Latents and frames of a session's first two chunks."""
    config = dataclasses.replace(DEMO, weights=str(weights), dtype=dtype)
    runner = ModelRunner(build_backends(config), config.model_config)
    session = Session(id="test", prompt=Prompt(index=0, text=PROMPTS[0]), noise=SeededNoise(7), slot=0)
    frames = [torch.from_numpy(runner.advance(session).frames) for _ in range(2)]
    return torch.cat(list(session.context_latents), 1).float(), torch.cat(frames).float()


# Recipes


def full_size(name: str) -> nn.Module:
    sizes = PRESETS["longlive-1.3b"]
    with torch.device("meta"):
        if name == TEXT_ENCODER:
            return TextEncoder(sizes.text_encoder)
        return CausalDiT(sizes.dit) if name == DIT else VAEDecoder(sizes.vae)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_quantized_or_says_why_not(name: str) -> None:
    model = full_size(name)
    quantized, unquantized = formats_of_layers(name, model, INT8)
    matrices = {
        key.removesuffix(".weight") for key, t in model.state_dict().items() if key.endswith(".weight") and t.dim() > 1
    }
    assert quantized.keys() | unquantized.keys() == matrices
    assert not quantized.keys() & unquantized.keys()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_full_size_dit_takes_little_more_than_half(name: str) -> None:
    model = full_size(DIT)
    layers, _ = formats_of_layers(DIT, model, RECIPES[name][DIT])
    state = {key: tensor.bfloat16() for key, tensor in model.state_dict().items()}
    input_stats = {}
    for layer, format in layers.items():
        inputs = torch.empty(state[f"{layer}.weight"].shape[1], device="meta")
        input_stats[layer] = InputStats(amax=inputs, smoothing=inputs if format.smoothing is not None else None)
    assert bytes_of(quantized_state(state, layers, input_stats)) / bytes_of(state) <= 0.53
    assert not any(layers[f"blocks.{block}.cross_attn.{part}"].inputs for block in range(30) for part in "kv")


def test_recipes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"recipe: got 'int4', expected some of \['int8', 'fp8', 'int8-vae'\]"):
        combine_recipes(["int4"])
    with pytest.raises(ValueError, match=r"got two for dit, text_encoder .int8 fp8., expected one per model"):
        combine_recipes(["int8", "fp8"])
    assert combine_recipes(["int8", "int8-vae"]).keys() == set(MODELS)


# What is written, and what it gives


def test_a_recipe_leaves_the_other_layers_and_models_alone(int8: Path) -> None:
    record = json.loads((int8 / command.RECORD).read_text(encoding="utf-8"))
    plain, state = (
        load_file(SHIPPED / "diffusion_pytorch_model.safetensors"),
        load_file(int8 / "dit.quantized.safetensors"),
    )
    for layer in ("patch_embedding", "text_embedding.0", "time_embedding.2", "time_projection.1", "head.head"):
        assert torch.equal(state[f"{layer}.weight"], plain[f"{layer}.weight"].bfloat16())
        assert record["kept_in_16_bits"][DIT][layer]
    for key, tensor in state.items():
        layer = key.rpartition(".")[0]
        if layer not in record["layers"][DIT]:
            assert tensor.dtype == torch.bfloat16, key
    assert state["blocks.0.ffn.0.quantized_weight"].dtype == torch.int8
    assert (int8 / "Wan2.1_VAE.pth").read_bytes() == (SHIPPED / "Wan2.1_VAE.pth").read_bytes()
    assert not (int8 / "diffusion_pytorch_model.safetensors").exists()
    assert [ModelLoader.open(DEMO.model_config, str(int8)).recipe(name) for name in MODELS] == ["int8", "int8", ""]


def test_a_checkpoint_says_where_it_comes_from(fp8: Path) -> None:
    with safe_open(fp8 / "vae_decoder.quantized.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["recipe"] == "int8-vae"
    assert metadata["source_sha256"] == sha256(SHIPPED / "Wan2.1_VAE.pth")
    assert json.loads(metadata["versions"])["nvidia-modelopt"]
    record = json.loads((fp8 / command.RECORD).read_text(encoding="utf-8"))
    assert record["files"]["dit.quantized.safetensors"]["sha256"] == sha256(fp8 / "dit.quantized.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_8_bits_and_scales_stay_what_they_are_in_a_bfloat16_model(fp8: Path, name: str) -> None:
    model = load_model(name, DEMO.model_config, str(fp8), "cpu", torch.bfloat16)
    file = load_file(fp8 / f"{name}.quantized.safetensors")
    state = model.state_dict()
    assert state.keys() == file.keys()
    for key, tensor in file.items():
        assert state[key].dtype == tensor.dtype, key
        assert torch.equal(state[key].float(), tensor.float()), key


def test_the_int8_model_makes_nearly_the_same_video(int8: Path) -> None:
    latents, _ = first_chunks(int8)
    expected, _ = first_chunks(SHIPPED)
    assert 1e-3 < relative_error(latents, expected) < 0.08


def test_the_fp8_model_and_the_int8_decoder_make_nearly_the_same_video(fp8: Path) -> None:
    latents, frames = first_chunks(fp8)
    expected, right = first_chunks(SHIPPED)
    assert 1e-3 < relative_error(latents, expected) < 0.12
    assert (frames - right).square().mean().sqrt() < 3  # of 255
    assert first_chunks(fp8, "bfloat16")[0].isfinite().all()


@pytest.mark.parametrize("model", [TEXT_ENCODER, DIT])
def test_graphs_of_the_int8_model_round_as_pytorch_does(int8: Path, tmp_path: Path, model: str) -> None:
    source = shallow(source_of_config(dataclasses.replace(DEMO, weights=str(int8))), 2)
    for graph in export(source, [model], "float32", tmp_path, check=True):
        assert graph.comparison is not None
        assert graph.comparison.fits, graph
        rounds = graph.name == DIT  # the others have 8 bits in their weights alone
        assert (1e-3 < graph.comparison.tolerance < 0.2) == rounds, graph


# Calibration


def test_calibration_sees_the_largest_inputs_of_the_serving_pipeline(fp8: Path) -> None:
    recorder = {DIT: ("blocks.0.self_attn.q", "blocks.4.ffn.2"), VAE_DECODER: ("decoder.upsamples.0.residual.2",)}
    record = json.loads((fp8 / command.RECORD).read_text(encoding="utf-8"))["layers"]
    backends = build_backends(DEMO)
    models: dict[str, Any] = {DIT: backends.dit, VAE_DECODER: backends.vae_decoder}
    largest: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            largest[name] = max(largest.get(name, 0.0), inputs[0].abs().max().item())

        return see

    for model, layers in recorder.items():
        for layer in layers:
            models[model].model.get_submodule(layer).register_forward_pre_hook(hook(layer))
    calibration_session(ModelRunner(backends, DEMO.model_config), PROMPTS[:1], 0)
    for model, layers in recorder.items():
        for layer in layers:
            assert record[model][layer]["input_amax"] == pytest.approx(largest[layer], rel=1e-4)


class Interrupted(BaseException):
    """Stands for Ctrl-C."""


def test_an_interrupted_calibration_goes_on_and_ends_as_if_it_had_not_been(int8: Path, tmp_path: Path) -> None:
    heard: list[int] = []

    def stop(done: int) -> None:
        heard.append(done)
        if done == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        made(tmp_path, ["int8"], PROMPTS, on_session=stop)
    assert not (tmp_path / "dit.quantized.safetensors").exists()
    half = load_file(tmp_path / FILE)
    assert any(not torch.equal(half[name], amax) for name, amax in load_file(int8 / FILE).items())
    made(tmp_path, ["int8"], PROMPTS, on_session=heard.append)
    assert heard == [0, 1, 1, 2]
    for file in (FILE, "dit.quantized.safetensors", "text_encoder.quantized.safetensors"):
        resumed, whole = load_file(tmp_path / file), load_file(int8 / file)
        assert resumed.keys() == whole.keys()
        for key, tensor in whole.items():
            assert torch.equal(resumed[key].float(), tensor.float()), key


def test_a_calibration_of_something_else_is_not_gone_on_with(fp8: Path, tmp_path: Path) -> None:
    shutil.copy(fp8 / FILE, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"got a calibration with formats .* delete it or choose another folder"):
        made(tmp_path, ["fp8"], PROMPTS[:1])
    with pytest.raises(ValueError, match="got a calibration with prompts"):
        made(tmp_path, ["fp8", "int8-vae"], PROMPTS)


def test_what_cannot_be_quantized_is_refused(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights: got 'random', expected a folder of checkpoints"):
        quantize(TINY, ["int8"], PROMPTS, tmp_path)
    with pytest.raises(ValueError, match="the source folder; expected another one"):
        quantize(DEMO, ["int8"], PROMPTS, SHIPPED)
    with pytest.raises(ValueError, match="prompts: got none"):
        quantize(DEMO, ["int8"], [], tmp_path)
    with pytest.raises(ValueError, match="got a dit quantized by 'fp8', expected an unquantized one"):
        quantize(dataclasses.replace(DEMO, weights=str(fp8)), ["int8"], PROMPTS, tmp_path)


def test_the_command_line_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--recipe", "int8", "--out", str(tmp_path)]
    assert command.main([*arguments, "--prompts", str(tmp_path / "none.txt")]) == 2
    assert "none.txt: cannot be read as text" in capsys.readouterr().err
    assert len(command.read_prompts(command.DEFAULT_PROMPTS)) == 16


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "quantize", stopped)
    assert command.main(["--recipe", "int8", "--out", str(tmp_path)]) == 130
    assert "0 sessions are saved, the same command continues" in capsys.readouterr().err


# Measures


def test_flow_errors_name_the_block_that_errs() -> None:
    backends = build_backends(TINY)
    reference = backends.dit
    assert isinstance(reference, TorchDiT)
    layers, _ = formats_of_layers(DIT, reference.model, dataclasses.replace(INT8, inputs=False))
    quantized = load_model(DIT, TINY.model_config, TINY.weights, "cpu", torch.float32)
    install(quantized, quantized_layers(quantized_state(reference.model.state_dict(), layers, {}), "cpu"))
    same = with_block(reference.model, reference.model, 1)
    last = with_block(reference.model, quantized, 1)
    others = {name: TorchDiT(model, TINY.model_config, 1, "base") for name, model in (("same", same), ("last", last))}
    compared = ComparedDiTs(reference, others)
    calibration_session(ModelRunner(dataclasses.replace(backends, dit=compared), TINY.model_config), PROMPTS, 0)
    assert max(max(errors) for errors in compared.flow["same"]) == 0
    assert all(min(errors) > 1e-4 for errors in compared.flow["last"])
    assert max(compared.blocks["last"][0]) == 0
    assert min(compared.blocks["last"][1]) > 1e-5


def test_a_rollout_that_drifts_off_is_noticed() -> None:
    steady, ones = [0.03 + 0.01 * math.sin(chunk) for chunk in range(80)], [1.0] * 80
    assert bounded(steady, ones)
    assert bounded([0.0] * 80, ones)
    assert not bounded([0.01 * 1.05**chunk for chunk in range(80)], ones)
    assert not bounded(steady, [1.0 - 0.003 * chunk for chunk in range(80)])


def test_columns_that_no_forward_was_measured_of_make_a_table_and_a_picture(tmp_path: Path) -> None:
    record = json.loads((Path(__file__).parents[2] / "results/quantization_long.json").read_text(encoding="utf-8"))
    assert "| attributes right at 60 s | 100.0 % | 100.0 % |" in markdown(record)
    plot(record, tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 1000


def test_the_readme_shows_the_measured_figures() -> None:
    root = Path(__file__).parents[2]
    record = json.loads((root / "results/quantization.json").read_text(encoding="utf-8"))
    assert markdown(record) in (root / "quantization/README.md").read_text(encoding="utf-8")
    for name, figures in record["recipes"].items():
        assert figures.get("bytes_ratio", 0.0) <= 0.53, name  # nothing is stored of what quantizes as it goes
        assert figures["attribute_accuracy_lost"] <= 0.02, name
        assert figures["switch_adoption_within_2_chunks_lost"] <= 0.02, name
        assert figures["rollout_bounded"], name
