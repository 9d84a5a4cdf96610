# SPDX-License-Identifier: Apache-2.0
"""Single forwards of the causal DiT against the reference: flows, caches, activations, RoPE, names."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import PRESETS, DiTConfig, WindowConfig
from longlive_serve.models.dit.causal_dit import CacheView, CausalDiT, time_features
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCachePlan, Window
from longlive_serve.models.dit.rope import RotaryTables, axis_angles, rotate, split_pairs
from tests.support.cases import golden
from tests.support.tolerance import Float64, assert_reference

pytestmark = pytest.mark.numeric

SIZES = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim")
TOKENS = 16  # per frame of the golden latents, a grid of 2 x 8


class Forward:
    """The golden model with an empty cache. In float64 it computes in that alone."""

    def __init__(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.facts, self.tensors = golden("dit_tiny_step")
        config = DiTConfig(**{key: self.facts["config"][key] for key in SIZES})
        self.model = CausalDiT(config)
        self.model.load_state_dict(golden("dit_tiny_weights")[1])
        self.model.to(dtype)
        self.mode = Float64() if dtype == torch.float64 else contextlib.nullcontext()
        self.tables = RotaryTables(config.head_dim, 2, 8, 3)
        shape = (config.num_layers, batch, config.num_heads, 12 * TOKENS, config.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def view(self, plan: KVCachePlan) -> CacheView:
        return CacheView(self.keys, self.values, self.tables, plan, relative=False)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timesteps: Any, prompts: Tensor, chunk: int = 0) -> Tensor | None:
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32).expand(latents.shape[:2])
        with self.mode:
            prompt_kv = self.model.embed_prompt(prompts)
            flow: Tensor = self.model(latents, timesteps, prompt_kv, self.view(Window(WindowConfig()).step(chunk)))
        return flow

    def cache(self, layer: int, chunk: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a chunk, as the reference lays them out."""
        rows = slice(chunk * 3 * TOKENS, (chunk + 1) * 3 * TOKENS)
        keys, values = (cache[layer, :, :, rows].transpose(1, 2) for cache in (self.keys, self.values))
        return keys, values


class Both:
    """The golden model in float32 and in float64."""

    def __init__(self, batch: int = 1) -> None:
        self.forwards = Forward(batch), Forward(batch, torch.float64)
        self.tensors = self.forwards[0].tensors

    def __call__(self, latents: Tensor, timesteps: Any, prompts: Tensor, chunk: int = 0) -> tuple[Tensor, Tensor]:
        got, exact = (forward(latents, timesteps, prompts, chunk) for forward in self.forwards)
        assert got is not None
        assert exact is not None
        return got, exact

    def assert_cache(self, prefix: str, chunk: int) -> None:
        for layer in range(3):
            got, exact = (forward.cache(layer, chunk) for forward in self.forwards)
            for name, ours, wide in zip("kv", got, exact, strict=True):
                assert_reference(ours, self.tensors[f"{prefix}.layer{layer}.{name}"], wide)


@pytest.mark.parametrize("step", range(5))
def test_a_first_chunk_at_every_noise_level(step: int) -> None:
    both = Both()
    x, timestep = both.tensors["x_block0"], both.tensors["timesteps"][step]
    flow, exact = both(x, timestep, both.tensors["prompt_embeds.p0"])
    assert_reference(flow, both.tensors[f"flow.t{step}"], exact)
    if step < 4:
        clean, exact = (FlowMatchScheduler().convert_flow_pred_to_x0(x, one, step) for one in (flow, exact))
        assert_reference(clean, both.tensors[f"x0.t{step}"], exact)
    if step in (0, 4):
        both.assert_cache(f"cache_after_t{step}", chunk=0)


def test_a_second_chunk_attends_to_the_committed_first_one() -> None:
    both = Both()
    tensors = both.tensors
    both(tensors["x_block0"], 0.0, tensors["prompt_embeds.p0"])
    flow, exact = both(tensors["x_block1"], tensors["timesteps"][1], tensors["prompt_embeds.p0"], chunk=1)
    assert_reference(flow, tensors["block1.flow.t1"], exact)
    both.assert_cache("block1.cache", chunk=1)


@torch.inference_mode()
def test_a_commit_writes_the_same_cache_as_a_full_forward() -> None:
    full, short = Forward(), Forward()
    x, prompt = full.tensors["x_block0"], full.tensors["prompt_embeds.p0"]
    full(x, 0.0, prompt)
    view = short.view(Window(WindowConfig()).step(0))
    assert short.model(x, torch.zeros(1, 3), short.model.embed_prompt(prompt), view, update_kv_cache=True) is None
    assert torch.equal(full.keys, short.keys)
    assert torch.equal(full.values, short.values)


def test_every_frame_may_have_its_own_timestep() -> None:
    both = Both()
    tensors = both.tensors
    flow, exact = both(tensors["x_block0"], tensors["perframe.timestep"], tensors["prompt_embeds.p0"])
    assert_reference(flow, tensors["perframe.flow"], exact)


def test_a_batch_of_two_keeps_its_rows_apart() -> None:
    both = Both(batch=2)
    tensors = both.tensors
    latents = torch.cat([tensors["x_block0"], tensors["x_block1"]])
    prompts = torch.cat([tensors["prompt_embeds.p0"], tensors["prompt_embeds.p1"]])
    flow, exact = both(latents, tensors["timesteps"][1], prompts)
    assert_reference(flow, tensors["batch2.flow.t1"], exact)


def test_bfloat16_is_as_close_as_the_reference_in_bfloat16() -> None:
    forward = Forward(dtype=torch.bfloat16)
    tensors = forward.tensors
    flow = forward(tensors["x_block0"].bfloat16(), tensors["timesteps"][1], tensors["prompt_embeds.p0"].bfloat16())
    assert flow is not None
    # Norms over thousands of roundings vary little, and one that is left out or added shows.
    ours, theirs = ((one.float() - tensors["flow.t1"]).norm() for one in (flow, tensors["bf16.flow.t1"]))
    assert theirs / 2 < ours < theirs * 1.5


@torch.inference_mode()
def test_prompt_keys_and_values_of_every_layer() -> None:
    model, tensors = Forward().model, golden("dit_tiny_step")[1]
    made = model.embed_prompt(tensors["prompt_embeds.p0"])
    with Float64():
        exact = model.embed_prompt(tensors["prompt_embeds.p0"])
    for name, ours, wide in zip("kv", made, exact, strict=True):
        for layer in range(3):
            expected = tensors[f"cross_cache.layer{layer}.{name}"]
            assert_reference(ours[layer].transpose(1, 2), expected, wide[layer].transpose(1, 2))


ACTIVATIONS = {
    "time_embedding": "act.time_embedding_e",
    "time_projection": "act.time_projection_e0_flat",
    "text_embedding": "act.text_embedding",
    "blocks.0.norm1": "act.block0.norm1",
    "blocks.0.self_attn.norm_q": "act.block0.q_normed_unrotated",
    "blocks.0.self_attn.norm_k": "act.block0.k_normed_unrotated",
    "blocks.0.self_attn.o": "act.block0.self_attn",
    "blocks.0.norm3": "act.block0.norm3",
    "blocks.0.cross_attn.o": "act.block0.cross_attn",
    "blocks.0.ffn": "act.block0.ffn",
    "blocks.0": "act.block0.out",
    "blocks.1": "act.block1.out",
    "blocks.2": "act.block2.out",
    "head": "act.head_out",
}


def test_activations_inside_the_model() -> None:
    both = Both()
    seen: dict[str, list[Tensor]] = {name: [] for name in ACTIVATIONS}
    for forward in both.forwards:
        for name in ACTIVATIONS:
            module = forward.model.get_submodule(name)
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen[name].append(output))
    both(both.tensors["x_block0"], both.tensors["timesteps"][1], both.tensors["prompt_embeds.p0"])
    for name, key in ACTIVATIONS.items():
        expected = both.tensors[key]
        got, exact = (one.reshape(expected.shape) for one in seen[name])
        assert_reference(got, expected, exact)


def test_rope_at_full_head_width() -> None:
    _, tensors = golden("dit_tiny_step")
    angles = torch.cat([axis_angles(1024, pairs)[tensors["rope128.rows"]] for pairs in split_pairs(128)], -1)
    assert split_pairs(128) == (22, 21, 21)
    torch.testing.assert_close(angles.cos(), tensors["rope128.cos"], atol=1e-12, rtol=0)
    torch.testing.assert_close(angles.sin(), tensors["rope128.sin"], atol=1e-12, rtol=0)
    tables = RotaryTables(128, 2, 4, frames_per_chunk=1)
    queries, of_chunks = tensors["rope128.q"].transpose(1, 2), tables.of_chunks((5, 6, 7))
    with Float64():
        exact = rotate(queries, *of_chunks)
    rotated, expected = rotate(queries, *of_chunks), tensors["rope128.q_rotated_start5"]
    assert_reference(rotated.transpose(1, 2), expected, exact.transpose(1, 2))


def test_time_features_at_full_width() -> None:
    _, tensors = golden("dit_tiny_step")
    torch.testing.assert_close(time_features(tensors["sinus256.t"], 256), tensors["sinus256.emb"], atol=1e-12, rtol=0)


def test_full_size_names_and_shapes_are_the_checkpoint_ones() -> None:
    expected = golden("key_inventory")[0]["dit"]["tensors"]
    with torch.device("meta"):
        model = CausalDiT(PRESETS["longlive-1.3b"].dit)
    assert {name: list(tensor.shape) for name, tensor in model.state_dict().items()} == expected
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 1_418_996_800


@torch.inference_mode()
def test_a_full_size_chunk_and_recache_need_no_value_from_the_device() -> None:
    """On the meta device a read-back of any value fails: what passes there cannot wait for a GPU either."""
    config = PRESETS["longlive-1.3b"]
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, num_layers=2))  # the others are like them
    with torch.device("meta"):
        model = CausalDiT(config.dit)
        latents = torch.empty(1, 12, 16, config.latent_height, config.latent_width)
        text = torch.empty(1, config.dit.text_len, config.dit.text_dim)
    window = Window(config.window)
    for variant in ("base", "infinity"):
        dit = TorchDiT(model, config, 1, variant)
        prompt_kv = dit.embed_prompt(text, 20)
        for chunk in (0, 5):
            flow = dit.denoise(latents[:, :3], 2, prompt_kv, 0, window.step(chunk))
            assert flow.shape == (1, 3, 16, 60, 104)
            dit.update_kv_cache(latents[:, :3], prompt_kv, 0, window.step(chunk))
        dit.update_kv_cache(latents[:, :9], prompt_kv, 0, window.recache(5, keep_sink=True))
        dit.update_kv_cache(latents, prompt_kv, 0, window.recache(5, keep_sink=False))
