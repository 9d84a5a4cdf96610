# SPDX-License-Identifier: Apache-2.0
"""What the benchmark stands on: the baseline against the reference, random models, and operations counted by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.engines.baseline.dit import EagerDiT
from benchmarks.engines.baseline.vae import PaddedConv3d, as_reference, pad_and_convolve
from benchmarks.engines.hardware import flops
from benchmarks.engines.models import KINDS, random_model
from benchmarks.engines.rows import ROWS, build
from longlive_serve.config.presets import PRESETS, TINY, VAE_DECODER, WAN, VAEConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.models.vae.decoder import CausalConv3d, VAEDecoder
from longlive_serve.replay import ReplayCase, case_model, exact_latents, load_case_tensors, replay
from longlive_serve.weights.loader import load_model
from tests.longlive_serve.models.test_vae_decoder import exact_frames
from tests.support.cases import golden, write_case
from tests.support.tolerance import assert_reference, whole_numbers

pytestmark = pytest.mark.numeric

FULL, TOY = PRESETS["longlive-1.3b"], PRESETS["tiny"]


@pytest.mark.parametrize(
    ("got", "tera"),
    [
        (flops.dit_pass(FULL, 3, 12), 28.29),
        (flops.dit_pass(FULL, 3, 3), 16.2),
        (flops.dit_chunk(FULL, whole_update=True), 141.5),
        (flops.recache(FULL, whole=True), 113.0),
        (flops.dit_pass(FULL, 9, 12), 85.0),
        (flops.recache(FULL, whole=False), 85.0 * 29 / 30),
        (flops.decoder_chunk(FULL, WAN), 40.65),
        (flops.decoder_chunk(FULL, TINY), 1.58),
    ],
)
def test_the_operations_of_the_full_size_are_as_known(got: float, tera: float) -> None:
    assert got / 1e12 == pytest.approx(tera, rel=0.01)


@pytest.mark.parametrize(
    "name",
    ["dit_tiny_rollout", "dit_tiny_switch_mid_sinkT", "dit_tiny_switch_mid_sinkF", "dit_tiny_switch_early_sinkT"],
)
def test_the_baseline_meets_the_reference(tmp_path: Path, name: str) -> None:
    path = write_case(tmp_path, name)
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    latents = replay(case, tensors, EagerDiT(case_model(case, tensors), case.model_config, 1))
    assert_reference(latents, tensors["latents"], exact_latents(case, tensors))


def test_a_slot_of_the_baseline_forgets_the_video_before() -> None:
    config = ServeConfig(preset="tiny", device="cpu", slots=2)
    runner = ModelRunner(build(ROWS[0], config), config.model_config)
    videos = []
    for slot in (0, 0, 1):
        session = Session(id="s", prompt=Prompt(index=0, text="a fox"), noise=SeededNoise(3), slot=slot)
        for chunk in range(6):
            if chunk == 5:
                session.add_prompt("another")
            frames = runner.advance(session).frames
        videos.append(torch.from_numpy(frames))
    assert torch.equal(videos[0], videos[1])
    assert torch.equal(videos[0], videos[2])
    assert videos[0].float().std() > 5


def test_the_baseline_decodes_the_reference_s_frames() -> None:
    facts, tensors = golden("vae_tiny")
    decoder = VAEDecoder(VAEConfig(base_dim=facts["config"]["dim"], num_res_blocks=facts["config"]["num_res_blocks"]))
    decoder.load_state_dict({k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")})
    names = decoder.state_dict().keys()
    reference, latents = as_reference(decoder), tensors["latents"]
    assert reference.state_dict().keys() == names
    assert not [module for module in reference.modules() if type(module) is CausalConv3d]
    height, width = latents.shape[-2:]
    cache = reference.initial_cache(latents.shape[0], height, width, "cpu", torch.float32)
    with torch.no_grad():
        frames, _ = reference(latents, cache, is_first=True)
    assert_reference(frames, tensors["frames_raw"], exact_frames())


def test_padding_by_itself_changes_no_convolution() -> None:
    conv, x = PaddedConv3d(CausalConv3d(4, 6)), whole_numbers(1, 4, 5, 6, 7)
    with torch.no_grad():
        conv.weight.copy_(whole_numbers(*conv.weight.shape))
        assert conv.bias is not None
        conv.bias.copy_(whole_numbers(6))
        assert torch.equal(pad_and_convolve(x, conv.weight, conv.bias), conv.convolve(x, conv.weight))


@pytest.mark.parametrize("name", KINDS)
def test_random_models_are_like_loaded_ones(name: str) -> None:
    models = [random_model(name, TOY, "cpu", torch.bfloat16, seed=seed) for seed in (0, 0, 1)]
    states = [model.state_dict() for model in models]
    loaded = load_model(name, TOY, "random", "cpu", torch.bfloat16)
    described = {key: (tensor.shape, tensor.dtype) for key, tensor in loaded.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in states[0].items()} == described
    assert not models[0].training
    for key, tensor in states[0].items():
        assert torch.isfinite(tensor).all(), key
        assert (tensor != 0).all(), key
        assert torch.equal(tensor, states[1][key]), key
        assert not torch.equal(tensor, states[2][key]), key
    if name == VAE_DECODER:
        assert torch.equal(models[0].std, loaded.std)
