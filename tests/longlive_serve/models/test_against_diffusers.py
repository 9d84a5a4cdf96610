# SPDX-License-Identifier: Apache-2.0
"""Our models against those of diffusers and transformers with the same random weights; names in a WanPipeline.

LongLive is Wan 2.1 with a cache: where one forward holds all frames that are attended to, it computes what Wan does.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import (
    DIT,
    PRESETS,
    TEXT_ENCODER,
    VAE_DECODER,
    DiTConfig,
    ModelConfig,
    TextEncoderConfig,
    VAEConfig,
)
from longlive_serve.models.dit.causal_dit import CacheView, CausalDiT, time_features
from longlive_serve.models.dit.kv_cache import KVCachePlan, Window
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.weights.checkpoint import load_strictly
from longlive_serve.weights.diffusers_mapping import FILES, from_diffusers, is_diffusers
from tests.support.tolerance import Float64

pytestmark = pytest.mark.numeric
WORDS = 50
ROUNDED_ONCE = 1e-6
"""What the DiT may be off in float64, for its tables of sines and cosines, which are float32."""
SMALL = ModelConfig(
    name="small",
    dit=DiTConfig(dim=256, num_heads=2, num_layers=3, ffn_dim=192, freq_dim=64, text_len=16, text_dim=64),
    vae=VAEConfig(base_dim=16, num_res_blocks=1),
    text_encoder=TextEncoderConfig(vocab_size=WORDS, dim=64, ffn_dim=96, num_heads=4, num_layers=3, head_dim=8),
    latent_height=4,
    latent_width=12,  # not square: rows and columns of the patches are told apart
)
CLASSES = {TEXT_ENCODER: TextEncoder, DIT: CausalDiT, VAE_DECODER: VAEDecoder}
SIZES = {TEXT_ENCODER: "text_encoder", DIT: "dit", VAE_DECODER: "vae"}


def their_model(model: str, config: ModelConfig) -> Any:
    """The model of diffusers or transformers in our sizes."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel  # seconds: not in each process that shares the tests
    from transformers import UMT5Config, UMT5EncoderModel

    if model == VAE_DECODER:
        vae = config.vae
        return AutoencoderKLWan(
            base_dim=vae.base_dim, z_dim=vae.z_dim, dim_mult=list(vae.dim_mult), num_res_blocks=vae.num_res_blocks
        )
    if model == DIT:
        dit = config.dit
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=dit.num_heads,
            attention_head_dim=dit.head_dim,
            in_channels=dit.channels,
            out_channels=dit.channels,
            text_dim=dit.text_dim,
            freq_dim=dit.freq_dim,
            ffn_dim=dit.ffn_dim,
            num_layers=dit.num_layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=dit.eps,
        )
    text = config.text_encoder
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=text.vocab_size,
            d_model=text.dim,
            d_kv=text.head_dim,
            d_ff=text.ffn_dim,
            num_layers=text.num_layers,
            num_heads=text.num_heads,
            relative_attention_num_buckets=text.num_buckets,
            relative_attention_max_distance=text.max_distance,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


def our_model(model: str, config: ModelConfig) -> Any:
    return CLASSES[model](getattr(config, SIZES[model])).eval()


@torch.no_grad()
def randomise(model: Any) -> None:
    """Other values in every parameter, so that none is at 0 or 1, where a mistake would not show."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma") or ("norm" in name and name.endswith("weight")):
            parameter.copy_(1 + 0.2 * noise)
        elif name.endswith("scale_shift_table") or parameter.dim() == 1:
            parameter.copy_(0.2 * noise)
        else:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        if name == "decoder.conv_out.weight":  # of the VAE: or some pixels would be clamped
            parameter.mul_(0.2)


@functools.cache
def pair(model: str) -> tuple[Any, Any]:
    """Their model and ours, with the same random weights."""
    theirs, ours = their_model(model, SMALL).eval(), our_model(model, SMALL)
    randomise(theirs)
    load_strictly(ours, from_diffusers(model, theirs.state_dict()), "diffusers")
    return theirs.requires_grad_(False).double(), ours.requires_grad_(False).double()


@pytest.fixture
def float64() -> Iterator[None]:
    """Two implementations of a model agree in it to nearly its last digit, on every processor."""
    for model in FILES:
        pair(model)
    with Float64():
        yield


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(11))


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


LATENTS = noise(1, 4, 16, 3, 4)  # [B, F, C, h, w]; diffusers takes [B, C, F, h, w]


@functools.cache
def decoded_by_diffusers() -> Tensor:
    """Their frames of `LATENTS`, un-normalised as their pipeline does it: our decoder does it itself."""
    theirs, _ = pair(VAE_DECODER)
    mean, std = (torch.tensor(theirs.config[key]).view(-1, 1, 1, 1) for key in ("latents_mean", "latents_std"))
    frames: Tensor = theirs.decode(LATENTS.transpose(1, 2) / (1.0 / std) + mean).sample.transpose(1, 2)
    assert frames.abs().max() < 1, "theirs are clamped, ours not"
    return frames


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("split", [(4,), (1, 1, 2)])
def test_the_vae_decoder_equals_diffusers_in_one_call_and_streamed(split: tuple[int, ...]) -> None:
    _, ours = pair(VAE_DECODER)
    cache, parts = ours.initial_cache(1, *LATENTS.shape[-2:], "cpu", torch.float32), []
    for index, part in enumerate(LATENTS.split(split, dim=1)):
        frames, cache = ours(part, cache, is_first=index == 0)
        parts.append(frames)
    assert relative_error(torch.cat(parts, dim=1), decoded_by_diffusers()) < 1e-10


@pytest.mark.usefixtures("float64")
def test_the_text_encoder_equals_transformers_and_is_zero_beyond_the_prompt() -> None:
    theirs, ours = pair(TEXT_ENCODER)
    mask = (torch.arange(16) < torch.tensor([[16], [7], [1]])).long()
    ids = torch.randint(1, WORDS, (3, 16), generator=torch.Generator().manual_seed(5)) * mask
    expected, got = theirs(input_ids=ids, attention_mask=mask).last_hidden_state, ours(ids, mask)
    assert relative_error(got[mask == 1], expected[mask == 1]) < 1e-10
    assert expected[mask == 0].any()
    assert not got[mask == 0].any()


@pytest.fixture(scope="module")
def dit() -> TorchDiT:
    return TorchDiT(pair(DIT)[1], SMALL, 1, "base")


NOISY, TEXT = noise(1, 12, 16, SMALL.latent_height, SMALL.latent_width), noise(1, 16, 64)
TOKENS = 9
TEXT[:, TOKENS:] = 0  # padding
WINDOW = Window(SMALL.window)


def flow_of_diffusers(latents: Tensor, timesteps: Tensor) -> Tensor:
    flow: Tensor = pair(DIT)[0](latents.transpose(1, 2), timesteps, TEXT).sample
    return flow.transpose(1, 2)


@pytest.fixture
def exact_sinusoids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs come from float32 angles, up to 1000 radians; the reference's and ours from float64."""
    embedder = pair(DIT)[0].condition_embedder
    monkeypatch.setattr(embedder.timesteps_proj, "forward", lambda t: time_features(t, SMALL.dit.freq_dim))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("step", range(4))
def test_the_first_chunk_equals_diffusers_at_every_noise_level(dit: TorchDiT, step: int) -> None:
    flow = dit.denoise(NOISY[:, :3], step, dit.embed_prompt(TEXT, TOKENS), 0, WINDOW.step(0))
    expected = flow_of_diffusers(NOISY[:, :3], dit.timesteps[step].expand(1))
    assert relative_error(flow, expected) < ROUNDED_ONCE


def flow_of(dit: TorchDiT, latents: Tensor, timesteps: Tensor, plan: KVCachePlan) -> Tensor:
    view = CacheView(*dit.cache.slot(0), dit.tables, plan, relative=False)
    flow: Tensor = dit.model(latents, timesteps, dit.embed_prompt(TEXT, TOKENS), view)
    return flow


@pytest.mark.usefixtures("float64", "exact_sinusoids")
def test_every_frame_with_a_timestep_of_its_own_equals_diffusers(dit: TorchDiT) -> None:
    timesteps = torch.tensor([[937.5, 625.0, 0.0]])
    flow = flow_of(dit, NOISY[:, :3], timesteps, WINDOW.step(0))
    expected = flow_of_diffusers(NOISY[:, :3], timesteps.repeat_interleave(SMALL.tokens_per_frame, dim=1))
    assert relative_error(flow, expected) < ROUNDED_ONCE


@pytest.mark.usefixtures("float64", "exact_sinusoids")
@pytest.mark.parametrize("done", [4, 6])
def test_a_whole_window_at_once_equals_diffusers_wherever_it_lies_in_the_video(dit: TorchDiT, done: int) -> None:
    plan = WINDOW.recache(done, keep_sink=False)
    order = [3 * chunk + frame for chunk in plan.query_positions for frame in range(3)]  # places are not in time order
    flow = flow_of(dit, NOISY[:, order], torch.full((1, 12), 750.0), plan)
    expected = flow_of_diffusers(NOISY, torch.tensor([750.0]))
    assert relative_error(flow, expected[:, order]) < ROUNDED_ONCE


@pytest.mark.parametrize("model", FILES)
def test_every_name_and_shape_at_full_size_is_one_of_ours(model: str) -> None:
    config = PRESETS["longlive-1.3b"]
    with torch.device("meta"):
        theirs, ours = their_model(model, config), our_model(model, config)
    mapped = from_diffusers(model, theirs.state_dict())
    assert {name: tensor.shape for name, tensor in mapped.items()} == {
        name: tensor.shape for name, tensor in ours.state_dict().items()
    }


@pytest.mark.parametrize("model", FILES)
def test_the_files_that_the_libraries_write_are_found_and_fit(tmp_path: Path, model: str) -> None:
    theirs, ours = pair(model)
    assert not is_diffusers(tmp_path)
    theirs.save_pretrained(tmp_path / Path(FILES[model]).parent, max_shard_size="500KB")
    assert is_diffusers(tmp_path)
    files = sorted(tmp_path.glob(FILES[model]))
    state = {name: tensor for file in files for name, tensor in load_file(file).items()}
    mapped = from_diffusers(model, state)
    load_strictly(our_model(model, SMALL), mapped, tmp_path)
    assert all(torch.equal(tensor, mapped[name]) for name, tensor in ours.state_dict().items())


def test_a_folder_in_the_published_layout_is_not_one_of_diffusers(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    (tmp_path / "google/umt5-xxl").mkdir(parents=True)
    assert not is_diffusers(tmp_path)


@pytest.mark.parametrize("name", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_may_have_either_of_its_names(name: str) -> None:
    theirs, _ = pair(TEXT_ENCODER)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if key != name}
    load_strictly(our_model(TEXT_ENCODER, SMALL), from_diffusers(TEXT_ENCODER, state), "one name")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (DIT, "condition_embedder.image_embedder.norm1.weight"),  # of image-to-video
        (DIT, "blocks.0.attn2.add_k_proj.weight"),
        (DIT, "blocks.0.attn1.to_q.lora_A.weight"),
        (DIT, "blocks.0.self_attn.o"),
        (VAE_DECODER, "decoder.up_blocks.0.upsampler.resample_conv.weight"),  # of Wan 2.2
        (VAE_DECODER, "decoder.up_blocks.0.resnets.0.norm3.gamma"),
        (VAE_DECODER, "decoder.mid_block.attentions.0.rope.weight"),
        (TEXT_ENCODER, "lm_head.weight"),
        (TEXT_ENCODER, "encoder.rope.weight"),
    ],
)
def test_a_name_that_fits_no_rule_stays_and_is_listed(model: str, name: str) -> None:
    theirs, ours = pair(model)
    mapped = from_diffusers(model, theirs.state_dict() | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"model:\n  unexpected {re.escape(name)}$"):
        load_strictly(ours, mapped, "diffusers")
