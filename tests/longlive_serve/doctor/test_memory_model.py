# SPDX-License-Identifier: Apache-2.0
"""What is said of memory, against the models, caches and sessions themselves: on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.engines.measure import Plan, SingleSession
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import DIT, PRESETS, TEXT_ENCODER, TINY, TINY_DECODER, VAE_DECODER, WAN
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor import memory_model
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.models.dit.causal_dit import CacheView, CausalDiT
from longlive_serve.models.dit.fused_dit import FP8Gemm, FusedCausalDiT, Gemm
from longlive_serve.models.dit.kv_cache import KVCache, Window
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.models.vae.decoder import FeatureCache, VAEDecoder
from longlive_serve.models.vae.tiny_decoder import TinyDecoder

FULL = PRESETS["longlive-1.3b"]
BF16 = torch.bfloat16


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, of those that are made while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ours = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | ours:
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return result

    def _forget(self, number: int, count: int) -> None:
        self._known.discard(number)
        self._now -= count


@pytest.fixture(scope="module", params=list(PRESETS))
def models(request: pytest.FixtureRequest) -> tuple[str, dict[str, nn.Module]]:
    config = PRESETS[request.param]
    with torch.device("meta"):
        return request.param, {
            DIT: CausalDiT(config.dit),
            TEXT_ENCODER: TextEncoder(config.text_encoder),
            VAE_DECODER: VAEDecoder(config.vae),
            TINY_DECODER: TinyDecoder(config.tiny_decoder),
        }


def test_parameters_are_those_of_the_models(models: tuple[str, dict[str, nn.Module]]) -> None:
    preset, built = models
    for name, model in built.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        assert memory_model.num_parameters(PRESETS[preset], name) == count, name


def test_a_session_holds_what_its_caches_hold(models: tuple[str, dict[str, nn.Module]]) -> None:
    preset, built = models
    config, dit = PRESETS[preset], built[DIT]
    session = memory_model.session_memory(config, "bfloat16")
    assert session.kv_slot == KVCache.bytes_of(config, 1, BF16)
    assert isinstance(dit, CausalDiT)
    prompt = dit.embed_prompt(torch.empty(1, config.dit.text_len, config.dit.text_dim, device="meta"))
    assert 2 * session.prompt_kv == sum(tensor.nbytes for tensor in prompt)  # it is in float32
    for decoder, name in ((WAN, VAE_DECODER), (TINY, TINY_DECODER)):
        cache = built[name].initial_cache(1, config.latent_height, config.latent_width, "meta", BF16)  # type: ignore[operator]
        held = memory_model.session_memory(config, "bfloat16", decoder).decoder_cache
        assert held == sum(tensor.nbytes for tensor in cache), decoder


def test_the_full_size_is_as_published() -> None:
    assert memory_model.dit_parameters(FULL.dit) == 1_418_996_800
    session = memory_model.session_memory(FULL, "bfloat16")
    assert round(session.kv_slot / memory_model.GIB, 2) == 3.21
    assert round(session.decoder_cache / memory_model.GIB, 2) == 1.76
    assert round(memory_model.session_memory(FULL, "bfloat16", TINY).decoder_cache / 2**20) == 64


@pytest.mark.parametrize("decoder", [WAN, TINY])
def test_a_real_session_takes_as_much_as_is_said(decoder: str) -> None:
    config = ServeConfig(preset="tiny", decoder=decoder, slots=2, device="cpu")
    runner = ModelRunner(build_backends(config), config.model_config)
    alone = SingleSession(runner, Plan(chunks=1, warmup=0, live_seconds=0, max_sessions=2), lambda what: None)
    assert alone.session_bytes()["total"] == memory_model.session_memory(config.model_config, "float32", decoder).total


def test_fp8_takes_as_much_as_is_said() -> None:
    config = PRESETS["tiny"]
    model = CausalDiT(config.dit).to(BF16)
    with torch.no_grad():
        fused = FusedCausalDiT(model, True, F.scaled_dot_product_attention)
    held: list[Tensor] = list(model.parameters())
    for block in fused.blocks:
        for product in (block.qkv, block.o, block.cross_q, block.cross_o, block.ffn_in, block.ffn_out):
            assert isinstance(product, Gemm | FP8Gemm)
            held += [product.weight, product.bias, *([product.scales] if isinstance(product, FP8Gemm) else [])]
    memory = memory_model.server_memory(config, dtype="bfloat16", fused_dit=True, fp8=True)
    assert memory.models[DIT] == sum(tensor.nbytes for tensor in held)


def peaks() -> Iterator[tuple[int, int]]:
    """What is estimated for working, and what full-size models take in PyTorch without its kernels' own needs."""
    size, frames = (FULL.latent_height, FULL.latent_width), FULL.window.chunk
    with torch.device("meta"), torch.no_grad():
        latents = torch.empty(1, frames, FULL.dit.channels, *size, dtype=BF16)
        wan, tiny = VAEDecoder(FULL.vae).to("meta").to(BF16), TinyDecoder(FULL.tiny_decoder).to(BF16)
        for name, model in ((WAN, wan), (TINY, tiny)):
            cache = model.initial_cache(1, *size, "meta", BF16)
            with PeakMemory() as counter:
                model(latents, cache, is_first=False)
            yield memory_model._decoder_workspace(FULL, name, False, 2), counter.peak
        cache = wan.initial_cache(1, *size, "meta", BF16)
        with PeakMemory() as counter:  # a whole chunk at once, as the fused backend does it
            wan.decoder(latents.transpose(1, 2), FeatureCache(cache), False)
        yield memory_model._decoder_workspace(FULL, WAN, True, 2), counter.peak
        yield memory_model._dit_workspace(FULL, 2), recache_peak()


def recache_peak() -> int:
    model, rows = CausalDiT(FULL.dit).to(BF16), FULL.window.window * FULL.tokens_per_frame
    heads = (FULL.dit.num_layers, 1, FULL.dit.num_heads)
    cache = [torch.empty(*heads, rows, FULL.dit.head_dim, dtype=BF16) for _ in "kv"]
    prompt = torch.empty(*heads, FULL.dit.text_len, FULL.dit.head_dim, dtype=BF16)
    with torch.device("cpu"):
        tables = RotaryTables(FULL.dit.head_dim, FULL.latent_height // 2, FULL.latent_width // 2, 3, "meta")
    view = CacheView(cache[0], cache[1], tables, Window(FULL.window).recache(9, False), relative=True)
    frames = FULL.window.window
    latents = torch.empty(1, frames, FULL.dit.channels, FULL.latent_height, FULL.latent_width, dtype=BF16)
    with PeakMemory() as counter:
        model(latents, torch.empty(1, frames), (prompt, prompt), view, update_kv_cache=True)
    return counter.peak


def test_what_is_estimated_for_working_is_enough_and_not_far_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: Tensor, *others: Tensor, **options: object) -> Tensor:
        return torch.empty_like(q)  # its kernels on a GPU make no matrix of weights

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    for estimate, peak in peaks():
        assert peak <= estimate <= 1.4 * peak


def test_sessions_fit_until_the_memory_is_full() -> None:
    memory = memory_model.server_memory(FULL, dtype="bfloat16")
    fit = memory.max_sessions(80 * memory_model.GIB)
    assert memory.total(fit) <= 80 * memory_model.GIB < memory.total(fit + 1)
    assert memory.max_sessions(memory_model.GIB) == 0
