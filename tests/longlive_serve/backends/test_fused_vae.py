# SPDX-License-Identifier: Apache-2.0
"""The fused VAE decoders: the reference's frames, any split of a video, several streams in turn, by graphs as well."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longlive_serve.backends.fused.vae import FusedVAEDecoder
from longlive_serve.backends.torch_backend import TorchVAEDecoder
from longlive_serve.config.presets import PRESETS, TINY_DECODER, VAE_DECODER, WAN
from longlive_serve.config.presets import TINY as TAEHV
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor import memory_model
from longlive_serve.models.vae.decoder import FeatureCache, ResidualBlock, VAEDecoder
from longlive_serve.models.vae.fused_decoder import LAST, DoublingConv, FusedVAE, Sum
from longlive_serve.models.vae.fused_tiny_decoder import FusedTiny
from longlive_serve.weights.loader import load_model
from quantization.dynamic_fp8 import simulate_decoder
from tests.fakes import cudnn_on_cpu as cudnn_stand_in
from tests.fakes.cudnn_on_cpu import cudnn_on_cpu
from tests.fakes.graphs_on_cpu import Graph, graphs_on_cpu
from tests.longlive_serve.models.test_vae_decoder import FRAMES, LATENTS, decoder, exact_frames, new_cache
from tests.support.tolerance import Float64, assert_as_near, assert_reference, whole_numbers

__all__ = ["cudnn_on_cpu", "decoder"]

pytestmark = pytest.mark.numeric

TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def video(seed: int, chunks: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 3 * chunks, 16, TINY.latent_height, TINY.latent_width)
    return list(torch.randn(shape, generator=generator).split(3, 1))


def frames_of(backend: FusedVAEDecoder | TorchVAEDecoder, latents: list[Tensor]) -> Iterator[np.ndarray[Any, Any]]:
    cache = backend.initial_cache()
    for number, part in enumerate(latents):
        frames, cache = backend.decode(part, cache, number == 0)
        yield frames.numpy()


def model(name: str = VAE_DECODER) -> nn.Module:
    made: nn.Module = load_model(name, TINY, "random", "cpu", torch.float32)
    return made


@pytest.mark.parametrize("split", [(1, 5), (1, 1, 1, 1, 1, 1), (1, 2, 3)])
def test_any_split_gives_the_frames_of_the_reference(decoder: VAEDecoder, split: tuple[int, ...]) -> None:
    cache = [tensor.contiguous(memory_format=LAST) for tensor in new_cache(decoder)]
    fused = FusedVAE(copy.deepcopy(decoder))
    parts = [fused.decode(part, cache, number == 0) for number, part in enumerate(LATENTS.split(split, 1))]
    assert_reference(torch.cat(parts, 1), FRAMES, exact_frames())


def test_a_convolution_of_a_doubled_picture_is_one_of_the_picture_itself() -> None:
    conv = nn.Conv2d(6, 4, 3, padding=1)
    conv.weight.copy_(whole_numbers(4, 6, 3, 3))
    assert conv.bias is not None
    conv.bias.copy_(whole_numbers(4))
    x = whole_numbers(1, 6, 2, 5, 7).contiguous(memory_format=LAST)
    expected = conv(nn.functional.interpolate(x[0].transpose(0, 1), scale_factor=2)).transpose(0, 1)[None]
    assert torch.equal(DoublingConv(conv)(x), expected)


@pytest.mark.parametrize("split", [(1, 5), (1, 1, 1, 1, 1, 1), (1, 2, 3)])
def test_the_tiny_decoder_draws_the_same_frames_by_any_split(split: tuple[int, ...]) -> None:
    plain, fused = model(TINY_DECODER), FusedTiny(model(TINY_DECODER))  # type: ignore[arg-type]
    latents = torch.cat(video(1, chunks=2), 1)
    size = TINY.latent_height, TINY.latent_width
    begin = plain.initial_cache(1, *size, "cpu", torch.float32)  # type: ignore[operator]
    expected, left = plain(latents, begin, is_first=True)
    with Float64():
        exact, exactly_left = plain(latents, begin, is_first=True)
    cache = fused.initial_cache(*size, torch.device("cpu"), torch.float32)
    parts = [fused.decode(part, cache, number == 0) for number, part in enumerate(latents.split(split, 1))]
    assert_as_near(torch.cat(parts, 1), expected, exact)
    for got, wanted, wide in zip(cache, left, exactly_left, strict=True):
        assert_as_near(got, wanted, wide)


@pytest.mark.parametrize("graphs", [False, True], ids=["as it is", "by graphs"])
@pytest.mark.parametrize("name", [VAE_DECODER, TINY_DECODER])
def test_streams_that_take_turns_give_the_frames_that_each_gives_alone(graphs: bool, name: str) -> None:
    videos = [video(seed, chunks=3) for seed in range(3)]
    plain = TorchVAEDecoder(model(name), TINY)  # type: ignore[arg-type]
    with graphs_on_cpu() if graphs else contextlib.nullcontext():
        backend = FusedVAEDecoder(model(name), TINY)  # type: ignore[arg-type]
        streams = [frames_of(backend, latents) for latents in videos]
        together = [[next(stream) for stream in streams] for _ in range(3)]
        captured, replayed = Graph.captured, Graph.replayed
    for number, latents in enumerate(videos):
        for turn, frames in enumerate(frames_of(plain, latents)):
            got = together[turn][number]
            assert got.shape == frames.shape
            # Numbers differ by some 1e-5 of the steps between pixels' values: few lie so near the border of two.
            assert np.abs(got.astype(int) - frames).max() <= 1
            assert (got != frames).mean() < 0.01
    if graphs:
        assert captured == 3  # opening, the two latent frames after it, a whole chunk
        assert replayed == 2 + 2 + 5


def test_a_stream_that_has_gone_leaves_nothing_behind() -> None:
    backend = FusedVAEDecoder(model(), TINY)  # type: ignore[arg-type]
    one, other = (video(seed, chunks=2) for seed in (1, 2))
    first = list(frames_of(backend, one))
    list(frames_of(backend, other))
    assert all(np.array_equal(a, b) for a, b in zip(frames_of(backend, one), first, strict=True))


def blocks_of(model: nn.Module) -> list[ResidualBlock]:
    return [module for module in model.modules() if isinstance(module, ResidualBlock)]


def of_parts(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A video's positions in rows, from its halves in turn: the later one sees a history."""
    return torch.cat([run(part) for part in x.split(2, 2)], 2).transpose(0, 1).flatten(1).T


def test_fp8_convolutions_are_what_the_evaluation_simulates(cudnn_on_cpu: None) -> None:
    """Block by block, where most positions see no number that lies so near the middle of two of FP8's that the order of
    a sum decides. Behind many blocks with random weights, which magnify it, such a number changes every pixel."""
    plain, exact = (TorchVAEDecoder(model(), TINY) for _ in range(2))  # type: ignore[arg-type]
    simulate_decoder(SimpleNamespace(backends=SimpleNamespace(vae_decoder=plain)))  # type: ignore[arg-type]
    fused = FusedVAEDecoder(model(), TINY, fp8=True).model  # type: ignore[arg-type]
    assert isinstance(fused, FusedVAE)
    apart: list[float] = []
    off: list[float] = []
    for ours, simulated, wide in zip(*map(blocks_of, (fused.model, plain.model, exact.model)), strict=True):
        convs = [conv for _, conv in wide.normed_convolutions()]
        empty = [torch.zeros(1, conv.in_channels, 2, 6, 8) for conv in convs]
        x = torch.randn(1, convs[0].in_channels, 4, 6, 8, generator=torch.Generator().manual_seed(len(off)))
        got = of_parts(fused_in_turn(fused, ours, empty), x)
        wanted, expected = (of_parts(in_turn(block, empty), x) for block in (simulated, wide))
        apart += ((got - wanted).abs().amax(1) / wanted.abs().max()).tolist()
        off += ((expected - wanted).abs().amax(1) / wanted.abs().max()).tolist()
    assert len(off) > 1000
    assert np.mean(np.array(off) > 1e-3) > 0.9
    assert np.mean(np.array(apart) < 1e-5) > 0.5


def fused_in_turn(fused: FusedVAE, block: ResidualBlock, history: list[Tensor]) -> Callable[[Tensor], Tensor]:
    cache = [x.to(torch.float8_e4m3fn).contiguous(memory_format=LAST) for x in history]
    return lambda part: fused._residual(block, Sum(part.contiguous(memory_format=LAST)), iter(cache)).whole()


def in_turn(block: ResidualBlock, history: list[Tensor]) -> Callable[[Tensor], Tensor]:
    def run(part: Tensor) -> Tensor:
        nonlocal history
        cache = FeatureCache(history)
        out: Tensor = block(part, cache)
        history = cache.new
        return out

    return run


def test_streams_in_fp8_take_turns(cudnn_on_cpu: None) -> None:
    backend = FusedVAEDecoder(model(), TINY, fp8=True)  # type: ignore[arg-type]
    exact = [[*frames_of(backend, video(seed, chunks=2))] for seed in (1, 2)]
    together = zip(*(frames_of(backend, video(seed, chunks=2)) for seed in (1, 2)), strict=True)
    for turn, (first, second) in enumerate(together):
        assert np.array_equal(first, exact[0][turn])
        assert np.array_equal(second, exact[1][turn])


def test_a_stream_in_fp8_holds_a_byte_for_what_its_convolutions_read(cudnn_on_cpu: None) -> None:
    backend = FusedVAEDecoder(model(), TINY, fp8=True)  # type: ignore[arg-type]
    held = sum(tensor.nbytes for tensor in backend.initial_cache())
    assert (
        held
        == memory_model.decoder_cache_bytes(TINY, WAN, 4, fp8=True)
        < memory_model.decoder_cache_bytes(TINY, WAN, 4) / 2
    )


def test_a_gpu_that_cudnn_has_no_plan_for_is_refused(cudnn_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise cudnn_stand_in.NotSupportedError("it is too old")

    monkeypatch.setattr(cudnn_stand_in.Graph, "validate", refuse)
    with pytest.raises(ValueError, match=r"fp8_decoder: got true on cpu: .* does not support this here: it is too old"):
        FusedVAEDecoder(model(), TINY, fp8=True)  # type: ignore[arg-type]


def test_fp8_convolutions_without_cudnns_frontend_are_refused() -> None:
    with pytest.raises(ValueError, match=r"fp8_decoder: got true without .*longlive-serve\[cudnn\]"):
        FusedVAEDecoder(model(), TINY, fp8=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="fp8_decoder: got true with backend fused and decoder tiny, expected fused"):
        ServeConfig(backend="fused", decoder=TAEHV, fp8_decoder=True)
