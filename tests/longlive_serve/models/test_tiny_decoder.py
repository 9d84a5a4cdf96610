# SPDX-License-Identifier: Apache-2.0
"""The tiny decoder: TAEHV's published layout and arithmetic, what streaming promises, and serving with it."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from longlive_serve.backends import registry
from longlive_serve.backends.registry import build_backends, choose_backends
from longlive_serve.backends.torch_backend import TorchVAEDecoder
from longlive_serve.config.presets import DIT, PRESETS, TEXT_ENCODER, TINY_DECODER, VAE_DECODER, TinyDecoderConfig
from longlive_serve.config.serve_config import TORCH, ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.engine.snapshot import dump, load_session
from longlive_serve.models.vae.tiny_decoder import TinyDecoder
from longlive_serve.weights.checkpoint import load_strictly
from longlive_serve.weights.layouts import TINY_DECODER_FILE
from longlive_serve.weights.loader import ModelLoader, load_model

pytestmark = pytest.mark.numeric

TINY = PRESETS["tiny"]
FULL = (256, 128, 64, 64)
LATENTS = torch.randn(2, 12, 16, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def published(channels: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `decoder.*` in taew2_1.pth, for stages of these widths."""
    first, second, third, last = channels
    shapes: dict[str, tuple[int, ...]] = {"1.weight": (first, 16, 3, 3), "1.bias": (first,)}
    for width, blocks in ((first, (3, 4, 5)), (second, (9, 10, 11)), (third, (15, 16, 17))):
        for block in blocks:
            for conv, inputs in ((0, 2 * width), (2, width), (4, width)):
                shapes[f"{block}.conv.{conv}.weight"] = (width, inputs, 3, 3)
                shapes[f"{block}.conv.{conv}.bias"] = (width,)
    shapes |= {"7.conv.weight": (first, first, 1, 1), "8.weight": (second, first, 3, 3)}
    shapes |= {"13.conv.weight": (2 * second, second, 1, 1), "14.weight": (third, second, 3, 3)}
    shapes |= {"19.conv.weight": (2 * third, third, 1, 1), "20.weight": (last, third, 3, 3)}
    shapes |= {"22.weight": (3, last, 3, 3), "22.bias": (3,)}
    return {f"decoder.{name}": shape for name, shape in shapes.items()}


def recomputed(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All frames of videos at once, 0 to 1: every layer over the whole time, pixels repeated before they are mixed."""
    videos = len(latents)

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"decoder.{name}.weight"], weights.get(f"decoder.{name}.bias"), padding=padding)

    x = conv(3 * torch.tanh(latents.flatten(0, 1) / 3), "1").relu()
    for first_block in (3, 9, 15):
        for block in range(first_block, first_block + 3):
            timeline = x.unflatten(0, (videos, -1))
            shifted = F.pad(timeline, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1].flatten(0, 1)
            y = torch.cat([x, shifted], dim=1)
            for number in (0, 2):
                y = conv(y, f"{block}.conv.{number}").relu()
            x = (conv(y, f"{block}.conv.4") + x).relu()
        width = x.shape[1]
        x = conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), f"{first_block + 4}.conv", padding=0)
        x = conv(x.reshape(-1, width, *x.shape[2:]), f"{first_block + 5}")
    return conv(x.relu(), "22").unflatten(0, (videos, -1))[:, 3:]


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    """With weights that let every layer be seen: PyTorch's own fade with the depth."""
    model = TinyDecoder(TinyDecoderConfig(channels=(12, 8, 6, 5))).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        scale = (2 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else 0.1
        scale /= 2 if name.count(".conv.") and weight.shape[-1] == 3 else 1  # blocks add to what there is
        weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model


def new_cache(decoder: TinyDecoder, latents: Tensor = LATENTS) -> list[Tensor]:
    batch, _, _, height, width = latents.shape
    return decoder.initial_cache(batch, height, width, "cpu", latents.dtype)


def stream(decoder: TinyDecoder, latents: Tensor, split: tuple[int, ...]) -> list[Tensor]:
    cache, parts = new_cache(decoder, latents), []
    for index, part in enumerate(latents.split(split, dim=1)):
        frames, cache = decoder(part, cache, is_first=index == 0)
        parts.append(frames)
    return parts


def test_names_and_shapes_are_those_of_the_published_file() -> None:
    with torch.device("meta"):
        model = TinyDecoder(PRESETS["longlive-1.3b"].tiny_decoder)
        state = {name: torch.empty(shape, dtype=torch.float16) for name, shape in published(FULL).items()}
    assert len(state) == 64
    assert state["decoder.7.conv.weight"].shape == (256, 256, 1, 1)
    load_strictly(model, state, TINY_DECODER_FILE)
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 9_844_611


def test_frames_are_those_of_a_computation_over_the_whole_time_at_once(decoder: TinyDecoder) -> None:
    frames, _ = decoder(LATENTS, new_cache(decoder), is_first=True)
    expected = recomputed(decoder.state_dict(), LATENTS)
    assert expected.std() > 0.1
    torch.testing.assert_close(frames, 2 * expected - 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [(12,), (3, 3, 3, 3), (1,) * 12, (2, 7, 1, 2)])
def test_any_split_gives_the_same_frames_bit_for_bit(decoder: TinyDecoder, split: tuple[int, ...]) -> None:
    full, _ = decoder(LATENTS, new_cache(decoder), is_first=True)
    parts = stream(decoder, LATENTS, split)
    assert [part.shape[1] for part in parts] == [4 * split[0] - 3] + [4 * latents for latents in split[1:]]
    assert full.shape == (2, 1 + 4 * 11, 3, 24, 40)
    assert torch.equal(torch.cat(parts, dim=1), full)


def test_a_call_changes_neither_the_cache_it_was_given_nor_the_latents(decoder: TinyDecoder) -> None:
    cache, latents = new_cache(decoder), LATENTS[:, :3].clone()
    for is_first in (True, False):
        tensors, copies = list(cache), [tensor.clone() for tensor in cache]
        _, following = decoder(latents, cache, is_first)
        assert all(now is before for now, before in zip(cache, tensors, strict=True))
        assert all(torch.equal(now, copy) for now, copy in zip(cache, copies, strict=True))
        assert torch.equal(latents, LATENTS[:, :3])
        assert [tensor.shape for tensor in following] == [tensor.shape for tensor in cache]
        assert all(tensor.any() for tensor in following)
        cache = following


def test_a_frame_sees_eight_latents_back_and_none_ahead(decoder: TinyDecoder) -> None:
    changed = LATENTS.clone()
    changed[:, 2] += 1
    frames, others = (decoder(latents, new_cache(decoder), is_first=True)[0] for latents in (LATENTS, changed))
    differs = (frames != others).transpose(0, 1).flatten(1).any(dim=1)  # of each frame
    of_latent = [part.any().item() for part in differs.split((1,) + (4,) * 11)]
    assert of_latent == [2 <= latent <= 10 for latent in range(12)]


def test_videos_in_a_batch_do_not_see_each_other(decoder: TinyDecoder) -> None:
    together, _ = decoder(LATENTS, new_cache(decoder), is_first=True)
    for video, frames in zip(LATENTS, together, strict=True):
        alone, _ = decoder(video[None], new_cache(decoder, video[None]), is_first=True)
        torch.testing.assert_close(alone[0], frames, rtol=0, atol=1e-12)


def test_frames_have_the_dtype_of_the_model() -> None:
    model = TinyDecoder(TINY.tiny_decoder).to(torch.bfloat16).requires_grad_(False)
    cache = model.initial_cache(1, 2, 3, "cpu", torch.bfloat16)
    frames, cache = model(torch.randn(1, 1, 16, 2, 3, dtype=torch.bfloat16), cache, is_first=True)
    assert {frames.dtype, *(tensor.dtype for tensor in cache)} == {torch.bfloat16}


def test_another_number_of_stages_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("got channels (8, 8), expected 4 numbers")):
        TinyDecoder(TinyDecoderConfig(channels=(8, 8)))


# The file.


def checkpoint() -> dict[str, Tensor]:
    """A file in the published layout, of the tiny preset: float16, an encoder in it."""
    generator = torch.Generator().manual_seed(3)
    shapes = published(TINY.tiny_decoder.channels)
    state = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
    return state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3).half()}


def load(folder: Path | str) -> TinyDecoder:
    model: TinyDecoder = load_model(TINY_DECODER, TINY, str(folder), "cpu", torch.float32)
    return model


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_in_the_published_layout_is_loaded(tmp_path: Path, suffix: str) -> None:
    state = checkpoint()
    file = (tmp_path / TINY_DECODER_FILE).with_suffix(suffix)
    torch.save(state, file) if suffix == ".pth" else save_file(state, file)
    loaded = load(tmp_path).state_dict()
    assert loaded.keys() == {name for name in state if not name.startswith("encoder.")}
    for name, tensor in loaded.items():
        assert torch.equal(tensor, state[name].float()), name


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / TINY_DECODER_FILE}: no such file")):
        load(tmp_path)
    state = checkpoint()
    state["decoder.23.weight"] = state.pop("decoder.1.bias")
    state["decoder.22.weight"] = torch.zeros(12, 4, 3, 3)
    torch.save(state, tmp_path / TINY_DECODER_FILE)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / TINY_DECODER_FILE))) as raised:
        load(tmp_path)
    for problem in (
        "missing decoder.1.bias",
        "unexpected decoder.23.weight",
        "decoder.22.weight: got [12, 4, 3, 3], expected [3, 4, 3, 3]",
    ):
        assert problem in str(raised.value)


def test_random_weights_are_the_same_every_time() -> None:
    for one, other in zip(load("random").parameters(), load("random").parameters(), strict=True):
        assert torch.equal(one, other)


# Serving with it.


@functools.cache
def runner() -> ModelRunner:
    config = ServeConfig(preset="tiny", decoder="tiny", device="cpu", slots=2)
    return ModelRunner(build_backends(config), config.model_config)


def new_session(slot: int) -> Session:
    return Session(id=f"s{slot}", prompt=Prompt(index=0, text="a fox"), noise=SeededNoise(slot), slot=slot)


def test_the_first_chunk_has_nine_frames_and_the_others_twelve() -> None:
    session = new_session(0)
    chunks = [runner().advance(session) for _ in range(3)]
    assert [chunk.frames.shape for chunk in chunks] == [(9, 32, 48, 3)] + [(12, 32, 48, 3)] * 2
    assert [chunk.first_frame for chunk in chunks] == [0, 9, 21]
    frames = np.concatenate([chunk.frames for chunk in chunks])
    assert frames.dtype == np.uint8
    assert frames.std() > 1


def test_frames_sent_early_are_those_of_the_whole_chunk() -> None:
    whole, early = new_session(0), new_session(0)
    for _ in range(2):
        parts = runner().collect_output(runner().execute_model_async(early, partial_chunks=True))
        frames = np.concatenate([part.frames for part in parts])
        assert np.array_equal(frames, runner().advance(whole).frames)


def test_interleaved_sessions_make_the_frames_that_each_makes_alone() -> None:
    alone = []
    for slot in (0, 1):
        session = new_session(slot)
        alone.append([runner().advance(session).frames for _ in range(4)])
    sessions = [new_session(slot) for slot in (0, 1)]
    for chunk in range(4):
        for slot, session in enumerate(sessions):
            assert np.array_equal(runner().advance(session).frames, alone[slot][chunk])
    assert not np.array_equal(alone[0][3], alone[1][3])


@pytest.mark.parametrize("chunks", [2, 7])
def test_a_snapshot_brings_the_decoder_back_as_it_was(chunks: int) -> None:
    session = new_session(0)
    for _ in range(chunks):
        runner().advance(session)
    resumed = load_session(dump(session, TINY), "resumed", "", TINY, "cpu", torch.float32)
    resumed.slot = 1
    runner().restore(resumed)
    assert session.decoder_cache is not None
    assert resumed.decoder_cache is not None
    for before, after in zip(session.decoder_cache, resumed.decoder_cache, strict=True):
        assert torch.equal(before, after)
    expected, got = runner().advance(session), runner().advance(resumed)
    assert (got.first_frame, got.frames.shape) == (expected.first_frame, expected.frames.shape)


def test_the_model_comes_from_where_the_others_do(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('decoder = "tiny"\ndevice = "cpu"\n')
    asked, config = [], ServeConfig.from_toml(tmp_path / "serve.toml")

    class WatchedLoader(ModelLoader):
        def load_model(self, name: str, device: str, dtype: torch.dtype) -> Any:
            asked.append(name)
            return super().load_model(name, device, dtype)

    built = build_backends(config, WatchedLoader.from_config(config))
    assert asked == [TEXT_ENCODER, DIT, TINY_DECODER]
    assert isinstance(built.vae_decoder, TorchVAEDecoder)
    assert isinstance(built.vae_decoder.model, TinyDecoder)


@pytest.mark.parametrize(("backend", "key"), [("onnxruntime", "graphs"), ("tensorrt", "tensorrt_engines")])
def test_graphs_and_engines_have_no_tiny_decoder(backend: str, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def served(**settings: Any) -> ServeConfig:
        return ServeConfig(decoder="tiny", **({key: "a folder"} | settings))

    for setting in ("backend", "vae_decoder_backend"):
        with pytest.raises(ValueError, match=f"decoder: got 'tiny' with the backend {backend}"):
            served(**{setting: backend})
    others = served(backend=backend, vae_decoder_backend=TORCH)
    chosen = choose_backends(others)
    assert (chosen[VAE_DECODER], chosen[DIT]) == (TORCH, backend)
    monkeypatch.setattr(registry, "_has_graphs", lambda *_: True)
    chosen = choose_backends(served())
    assert (chosen[VAE_DECODER], chosen[DIT]) == (TORCH, backend)


def test_an_unknown_decoder_is_an_error() -> None:
    with pytest.raises(ValueError, match=re.escape("decoder: got 'small', expected one of ['wan', 'tiny']")):
        ServeConfig(decoder="small")
