# SPDX-License-Identifier: Apache-2.0
"""The fused VAE decoders: the reference's frames, any split of a video, several streams in turn, by graphs as well."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longlive_serve import sizing
from longlive_serve.config import PRESETS, TINY_DECODER, VAE_DECODER, WAN, ServeConfig
from longlive_serve.config import TINY as TAEHV
from longlive_serve.engines.fused_vae_engine import FusedVAEDecoder
from longlive_serve.engines.torch_engine import TorchVAEDecoder
from longlive_serve.models.fused_tiny import FusedTiny
from longlive_serve.models.fused_vae import LAST, DoublingConv, FusedVAE
from longlive_serve.models.vae_decoder import VAEDecoder
from longlive_serve.weights import load_network
from quantization.dynamic_fp8 import simulate_decoder
from tests import cudnn_on_cpu as cudnn_stand_in
from tests.cudnn_on_cpu import cudnn_on_cpu
from tests.graphs_on_cpu import Graph, graphs_on_cpu
from tests.test_vae_decoder import FRAMES, LATENTS, decoder, new_cache, relative_error

__all__ = ["cudnn_on_cpu", "decoder"]

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def video(seed: int, chunks: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3 * chunks, 16, TINY.latent_height, TINY.latent_width)
    return list(torch.randn(shape, generator=generator).split(3, 1))


def frames_of(engine: FusedVAEDecoder | TorchVAEDecoder, latents: list[Tensor]) -> Iterator[np.ndarray[Any, Any]]:
    cache = engine.initial_cache()
    for number, part in enumerate(latents):
        frames, cache = engine.decode(part, cache, number == 0)
        yield frames.numpy()


def network(name: str = VAE_DECODER) -> nn.Module:
    made: nn.Module = load_network(name, TINY, "random", "cpu", torch.float32)
    return made


@pytest.mark.parametrize("split", [(1, 5), (1, 1, 1, 1, 1, 1), (1, 2, 3)])
def test_any_split_gives_the_frames_of_the_reference(decoder: VAEDecoder, split: tuple[int, ...]) -> None:
    cache = [tensor.contiguous(memory_format=LAST) for tensor in new_cache(decoder)]
    fused = FusedVAE(decoder)
    parts = [fused.decode(part, cache, number == 0) for number, part in enumerate(LATENTS.split(split, 1))]
    assert relative_error(torch.cat(parts, 1), FRAMES) < 5e-6


def test_a_convolution_of_a_doubled_picture_is_one_of_the_picture_itself() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, padding=1)
    x = torch.randn(1, 6, 2, 5, 7).contiguous(memory_format=LAST)
    expected = conv(nn.functional.interpolate(x[0].transpose(0, 1), scale_factor=2)).transpose(0, 1)[None]
    torch.testing.assert_close(DoublingConv(conv)(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("split", [(1, 5), (1, 1, 1, 1, 1, 1), (1, 2, 3)])
def test_the_tiny_decoder_draws_the_same_frames_by_any_split(split: tuple[int, ...]) -> None:
    plain, fused = network(TINY_DECODER), FusedTiny(network(TINY_DECODER))  # type: ignore[arg-type]
    latents = torch.cat(video(1, chunks=2), 1)
    size = TINY.latent_height, TINY.latent_width
    expected, left = plain(latents, plain.initial_cache(1, *size, "cpu", torch.float32), opening=True)  # type: ignore[operator]
    cache = fused.initial_cache(*size, torch.device("cpu"), torch.float32)
    parts = [fused.decode(part, cache, number == 0) for number, part in enumerate(latents.split(split, 1))]
    assert relative_error(torch.cat(parts, 1), expected) < 5e-6
    assert all(relative_error(got, wanted) < 5e-6 for got, wanted in zip(cache, left, strict=True))


@pytest.mark.parametrize("graphs", [False, True], ids=["as it is", "by graphs"])
@pytest.mark.parametrize("name", [VAE_DECODER, TINY_DECODER])
def test_streams_that_take_turns_give_the_frames_that_each_gives_alone(graphs: bool, name: str) -> None:
    videos = [video(seed) for seed in range(3)]
    plain = TorchVAEDecoder(network(name), TINY)  # type: ignore[arg-type]
    with graphs_on_cpu() if graphs else contextlib.nullcontext():
        engine = FusedVAEDecoder(network(name), TINY)  # type: ignore[arg-type]
        streams = [frames_of(engine, latents) for latents in videos]
        together = [[next(stream) for stream in streams] for _ in range(4)]
        captured, replayed = Graph.captured, Graph.replayed
    for number, latents in enumerate(videos):
        for turn, frames in enumerate(frames_of(plain, latents)):
            got = together[turn][number]
            assert got.shape == frames.shape
            assert np.abs(got.astype(int) - frames).max() <= 1  # where a number lies on the border between two
            assert (got != frames).mean() < 1e-3
    if graphs:
        assert captured == 3  # opening, the two latent frames after it, a whole chunk
        assert replayed == 2 + 2 + 8


def test_a_stream_that_has_gone_leaves_nothing_behind() -> None:
    engine = FusedVAEDecoder(network(), TINY)  # type: ignore[arg-type]
    first = list(frames_of(engine, video(1)))
    list(frames_of(engine, video(2)))
    assert all(np.array_equal(a, b) for a, b in zip(frames_of(engine, video(1)), first, strict=True))


def test_fp8_convolutions_are_what_the_evaluation_simulates(cudnn_on_cpu: None) -> None:
    plain, exact = (TorchVAEDecoder(network(), TINY) for _ in range(2))  # type: ignore[arg-type]
    simulate_decoder(SimpleNamespace(engines=SimpleNamespace(vae_decoder=plain)))  # type: ignore[arg-type]
    fused = FusedVAEDecoder(network(), TINY, fp8=True)  # type: ignore[arg-type]
    wanted, got, expected = (np.concatenate([*frames_of(engine, video(1))]) for engine in (plain, fused, exact))
    # A number near the middle of two of FP8's may be rounded to either.
    apart, off = (np.square(got - other.astype(float)).mean() for other in (wanted, expected))
    assert apart < off / 5
    assert 0 < off < 100  # of networks with random weights


def test_streams_in_fp8_take_turns(cudnn_on_cpu: None) -> None:
    engine = FusedVAEDecoder(network(), TINY, fp8=True)  # type: ignore[arg-type]
    alone = [[*frames_of(engine, video(seed, chunks=2))] for seed in (1, 2)]
    together = zip(*(frames_of(engine, video(seed, chunks=2)) for seed in (1, 2)), strict=True)
    for turn, (first, second) in enumerate(together):
        assert np.array_equal(first, alone[0][turn])
        assert np.array_equal(second, alone[1][turn])


def test_a_stream_in_fp8_holds_a_byte_for_what_its_convolutions_read(cudnn_on_cpu: None) -> None:
    engine = FusedVAEDecoder(network(), TINY, fp8=True)  # type: ignore[arg-type]
    held = sum(tensor.nbytes for tensor in engine.initial_cache())
    assert held == sizing.decoder_cache_bytes(TINY, WAN, 4, fp8=True) < sizing.decoder_cache_bytes(TINY, WAN, 4) / 2


def test_a_gpu_that_cudnn_has_no_plan_for_is_refused(cudnn_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise cudnn_stand_in.NotSupportedError("it is too old")

    monkeypatch.setattr(cudnn_stand_in.Graph, "validate", refuse)
    with pytest.raises(ValueError, match=r"fp8_decoder: got true on cpu: .* no plan for this here: it is too old"):
        FusedVAEDecoder(network(), TINY, fp8=True)  # type: ignore[arg-type]


def test_fp8_convolutions_without_cudnns_frontend_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fp8_decoder: got true without .*longlive-serve\[cudnn\]"):
        FusedVAEDecoder(network(), TINY, fp8=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8_decoder: got true with engine fused and decoder tiny, expected fused"):
        ServeConfig(engine="fused", decoder=TAEHV, fp8_decoder=True)
