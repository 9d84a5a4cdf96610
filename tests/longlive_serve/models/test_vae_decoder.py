# SPDX-License-Identifier: Apache-2.0
"""The streaming VAE decoder against the reference's frames, and what streaming promises."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_serve.config.presets import PRESETS, VAEConfig
from longlive_serve.models.vae.decoder import CausalConv3d, FeatureCache, VAEDecoder, to_uint8
from tests.support.cases import golden
from tests.support.tolerance import Float64, assert_reference

pytestmark = pytest.mark.numeric

FACTS, TENSORS = golden("vae_tiny")
LATENTS, FRAMES = TENSORS["latents"], TENSORS["frames_raw"]


def golden_decoder() -> VAEDecoder:
    vae = VAEDecoder(VAEConfig(base_dim=FACTS["config"]["dim"], num_res_blocks=FACTS["config"]["num_res_blocks"]))
    vae.load_state_dict({k.removeprefix("state."): v for k, v in TENSORS.items() if k.startswith("state.")})
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def decoder() -> VAEDecoder:
    return golden_decoder()


def new_cache(decoder: VAEDecoder, latents: Tensor = LATENTS) -> list[Tensor]:
    batch, _, _, height, width = latents.shape
    return decoder.initial_cache(batch, height, width, "cpu", torch.float32)


def stream(decoder: VAEDecoder, latents: Tensor, split: tuple[int, ...]) -> list[Tensor]:
    cache, parts = new_cache(decoder, latents), []
    for index, part in enumerate(latents.split(split, dim=1)):
        frames, cache = decoder(part, cache, is_first=index == 0)
        parts.append(frames)
    return parts


def relative_error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


@functools.cache
def exact_frames() -> Tensor:
    """The reference's frames in float64, of the model that they are of."""
    vae = golden_decoder()
    with Float64():
        frames: Tensor = vae(LATENTS, new_cache(vae), is_first=True)[0]
    return frames


def test_decoding_all_latents_equals_the_reference(decoder: VAEDecoder) -> None:
    frames, _ = decoder(LATENTS, new_cache(decoder), is_first=True)
    assert_reference(frames, FRAMES, exact_frames())


@pytest.mark.parametrize(
    ("split", "counts"), [((3, 3), FACTS["facts"]["frames_stream"]), ((1,) * 6, FACTS["facts"]["frames_one_by_one"])]
)
def test_streaming_equals_decoding_all_latents_bit_for_bit(
    decoder: VAEDecoder, split: tuple[int, ...], counts: list[int]
) -> None:
    full, _ = decoder(LATENTS, new_cache(decoder), is_first=True)
    parts = stream(decoder, LATENTS, split)
    assert [part.shape[1] for part in parts] == counts
    assert torch.equal(torch.cat(parts, dim=1), full)


def test_a_call_changes_neither_the_cache_it_was_given_nor_the_latents(decoder: VAEDecoder) -> None:
    cache, latents = new_cache(decoder), LATENTS[:, :3].clone()
    for is_first in (True, False):
        tensors, copies = list(cache), [tensor.clone() for tensor in cache]
        _, following = decoder(latents, cache, is_first)
        assert all(now is before for now, before in zip(cache, tensors, strict=True))
        assert all(torch.equal(now, copy) for now, copy in zip(cache, copies, strict=True))
        assert torch.equal(latents, LATENTS[:, :3])
        assert [tensor.shape for tensor in following] == [tensor.shape for tensor in cache]
        cache = following


def test_the_first_latent_stays_out_of_the_history_of_the_time_convs_only(decoder: VAEDecoder) -> None:
    _, cache = decoder(LATENTS[:, :1], new_cache(decoder), is_first=True)
    reference: list[Any] = FACTS["cache_shapes_after_latent"]["0"][:-1]  # one more is allocated than used
    assert [not tensor.any() for tensor in cache] == [shape == "Rep" for shape in reference]
    assert [list(tensor.shape) for tensor in cache] == FACTS["cache_shapes_after_latent"]["2"][:-1]


def test_a_first_latent_in_the_history_of_a_time_conv_would_be_seen(decoder: VAEDecoder) -> None:
    first, cache = decoder(LATENTS[:, :1], new_cache(decoder), is_first=True)
    _, wrong = decoder(LATENTS[:, :1], new_cache(decoder), is_first=False)
    time_conv = FACTS["cache_shapes_after_latent"]["0"].index("Rep")
    cache[time_conv] = wrong[time_conv]
    frames, _ = decoder(LATENTS[:, 1:], cache, is_first=False)
    assert relative_error(torch.cat([first, frames], dim=1), FRAMES) > 0.01


def test_videos_in_a_batch_do_not_see_each_other(decoder: VAEDecoder) -> None:
    videos = torch.stack([LATENTS[0, :2], LATENTS[0, 2:4]])
    with Float64():  # there a batch, which may be added up in another order, differs by nothing that counts
        together = torch.cat(stream(decoder, videos, (1, 1)), dim=1)
        for video, frames in zip(videos, together, strict=True):
            alone = torch.cat(stream(decoder, video[None], (1, 1)), dim=1)
            assert relative_error(frames, alone[0]) < 1e-10


# In float64, where only a wrong result differs: in float32 a model of few channels magnifies another order of sums.
@pytest.mark.parametrize(("kernel", "frames"), [*itertools.product((1, 3), (1, 2, 4))])
def test_the_convolution_by_conv2d_equals_conv3d(kernel: int, frames: int) -> None:
    conv = CausalConv3d(5, 7, kernel).double().requires_grad_(False)
    history, x = torch.randn(2, 5, 2, 4, 6).double(), torch.randn(2, 5, frames, 4, 6).double()
    expected = torch.nn.Conv3d.forward(conv, torch.cat([history, x], dim=2))
    assert relative_error(conv(x, FeatureCache([history])), expected) < 1e-12


@pytest.mark.parametrize("is_first", [True, False])
def test_an_exported_latent_equals_the_model(is_first: bool) -> None:
    vae = VAEDecoder(PRESETS["tiny"].vae).double().requires_grad_(False)
    latents = torch.randn(1, 1, 16, 2, 3).double()
    cache = [torch.randn_like(tensor).double() for tensor in new_cache(vae, latents)]
    exported = torch.export.export(vae, (latents, cache, is_first)).module()
    got, expected = exported(latents, cache, is_first), vae(latents, cache, is_first)
    assert relative_error(got[0], expected[0]) < 1e-10
    for tensor, reference in zip(got[1], expected[1], strict=True):
        assert relative_error(tensor, reference) < 1e-10


def test_names_and_shapes_are_those_of_the_checkpoint() -> None:
    with torch.device("meta"):
        vae = VAEDecoder(PRESETS["longlive-1.3b"].vae)
    inventory = golden("key_inventory")[0]["vae"]["tensors"]
    decoder_keys = {k: v for k, v in inventory.items() if k.startswith(("decoder.", "conv2."))}
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == decoder_keys


def test_the_latent_statistics_survive_the_meta_device() -> None:
    with torch.device("meta"):
        vae = VAEDecoder(PRESETS["tiny"].vae)
    assert torch.equal(vae.mean.flatten(), TENSORS["mean"])
    assert torch.equal(vae.std.flatten(), TENSORS["std"])


def test_frames_have_the_dtype_of_the_model() -> None:
    vae = VAEDecoder(PRESETS["tiny"].vae).to(torch.bfloat16).requires_grad_(False)
    cache = vae.initial_cache(1, 2, 3, "cpu", torch.bfloat16)
    frames, cache = vae(torch.randn(1, 1, 16, 2, 3, dtype=torch.bfloat16), cache, is_first=True)
    assert {frames.dtype, *(tensor.dtype for tensor in cache)} == {torch.bfloat16}


def test_other_latents_than_wan_s_are_an_error() -> None:
    with pytest.raises(ValueError, match="got z_dim 4"):
        VAEDecoder(VAEConfig(base_dim=4, z_dim=4))


def test_uint8_frames_are_clamped_truncated_and_channel_last() -> None:
    values = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 0.999, 1.0, 3.0])
    frames = values.view(1, 1, 1, 2, 4).repeat(1, 2, 3, 1, 1)
    pixels = to_uint8(frames)
    assert pixels.dtype == torch.uint8
    assert pixels.shape == (1, 2, 2, 4, 3)
    assert pixels.is_contiguous()
    assert pixels[0, 1, :, :, 2].flatten().tolist() == [0, 0, 63, 127, 191, 254, 255, 255]
