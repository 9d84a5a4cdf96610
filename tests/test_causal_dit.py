# SPDX-License-Identifier: Apache-2.0
"""Single forwards of the causal DiT against the reference: flows, caches, activations, RoPE, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_serve.config import PRESETS, DiTConfig, WindowConfig
from longlive_serve.engines.torch_engine import TorchDiT
from longlive_serve.kv_cache import Placement, Window
from longlive_serve.models.causal_dit import CacheView, CausalDiT, time_features
from longlive_serve.models.rope import RotaryTables, axis_angles, rotate, split_pairs
from longlive_serve.noise_schedule import NoiseSchedule
from tests.conftest import golden

SIZES = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim")
TOKENS = 16  # per frame of the golden latents, a grid of 2 x 8


def assert_close(got: Tensor | None, expected: Tensor, tolerance: float = 5e-6) -> None:
    assert got is not None
    assert got.shape == expected.shape
    error = ((got.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    assert error <= tolerance, f"error {error:.2e} of max|x|"


class Forward:
    """The golden network with an empty cache."""

    def __init__(self, batch: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.facts, self.tensors = golden("dit_tiny_step")
        config = DiTConfig(**{key: self.facts["config"][key] for key in SIZES})
        self.network = CausalDiT(config)
        self.network.load_state_dict(golden("dit_tiny_weights")[1])
        self.network.to(dtype)
        self.tables = RotaryTables(config.head_dim, 2, 8, 3)
        shape = (config.num_layers, batch, config.num_heads, 12 * TOKENS, config.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)

    def view(self, placement: Placement) -> CacheView:
        return CacheView(self.keys, self.values, self.tables, placement, relative=False)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timesteps: Any, prompts: Tensor, chunk: int = 0) -> Tensor | None:
        timesteps = torch.as_tensor(timesteps, dtype=torch.float32).expand(latents.shape[:2])
        prompt_kv = self.network.embed_prompt(prompts)
        flow: Tensor = self.network(latents, timesteps, prompt_kv, self.view(Window(WindowConfig()).step(chunk)))
        return flow

    def assert_cache(self, prefix: str, chunk: int) -> None:
        rows = slice(chunk * 3 * TOKENS, (chunk + 1) * 3 * TOKENS)
        for layer in range(3):
            assert_close(self.keys[layer, :, :, rows].transpose(1, 2), self.tensors[f"{prefix}.layer{layer}.k"])
            assert_close(self.values[layer, :, :, rows].transpose(1, 2), self.tensors[f"{prefix}.layer{layer}.v"])


@pytest.mark.parametrize("step", range(5))
def test_a_first_chunk_at_every_noise_level(step: int) -> None:
    forward = Forward()
    x, timestep = forward.tensors["x_block0"], forward.tensors["timesteps"][step]
    flow = forward(x, timestep, forward.tensors["prompt_embeds.p0"])
    assert_close(flow, forward.tensors[f"flow.t{step}"])
    if step < 4:
        assert flow is not None
        assert_close(NoiseSchedule().clean_latents(x, flow, step), forward.tensors[f"x0.t{step}"])
    if step in (0, 4):
        forward.assert_cache(f"cache_after_t{step}", chunk=0)


def test_a_second_chunk_attends_to_the_committed_first_one() -> None:
    forward = Forward()
    tensors = forward.tensors
    forward(tensors["x_block0"], 0.0, tensors["prompt_embeds.p0"])
    flow = forward(tensors["x_block1"], tensors["timesteps"][1], tensors["prompt_embeds.p0"], chunk=1)
    assert_close(flow, tensors["block1.flow.t1"])
    forward.assert_cache("block1.cache", chunk=1)


@torch.inference_mode()
def test_a_commit_writes_the_same_cache_as_a_full_forward() -> None:
    full, short = Forward(), Forward()
    x, prompt = full.tensors["x_block0"], full.tensors["prompt_embeds.p0"]
    full(x, 0.0, prompt)
    view = short.view(Window(WindowConfig()).step(0))
    assert short.network(x, torch.zeros(1, 3), short.network.embed_prompt(prompt), view, commit=True) is None
    assert torch.equal(full.keys, short.keys)
    assert torch.equal(full.values, short.values)


def test_every_frame_may_have_its_own_timestep() -> None:
    forward = Forward()
    flow = forward(
        forward.tensors["x_block0"], forward.tensors["perframe.timestep"], forward.tensors["prompt_embeds.p0"]
    )
    assert_close(flow, forward.tensors["perframe.flow"])


def test_a_batch_of_two_keeps_its_rows_apart() -> None:
    forward = Forward(batch=2)
    tensors = forward.tensors
    latents = torch.cat([tensors["x_block0"], tensors["x_block1"]])
    prompts = torch.cat([tensors["prompt_embeds.p0"], tensors["prompt_embeds.p1"]])
    assert_close(forward(latents, tensors["timesteps"][1], prompts), tensors["batch2.flow.t1"])


def test_bfloat16_is_as_close_as_the_reference_in_bfloat16() -> None:
    forward = Forward(dtype=torch.bfloat16)
    tensors = forward.tensors
    flow = forward(tensors["x_block0"].bfloat16(), tensors["timesteps"][1], tensors["prompt_embeds.p0"].bfloat16())
    assert_close(flow, tensors["flow.t1"], 1.5 * forward.facts["bf16_vs_f32_rel_max"])
    assert_close(flow, tensors["bf16.flow.t1"], forward.facts["bf16_vs_f32_rel_max"])


@torch.inference_mode()
def test_prompt_keys_and_values_of_every_layer() -> None:
    forward = Forward()
    keys, values = forward.network.embed_prompt(forward.tensors["prompt_embeds.p0"])
    for layer in range(3):
        assert_close(keys[layer].transpose(1, 2), forward.tensors[f"cross_cache.layer{layer}.k"])
        assert_close(values[layer].transpose(1, 2), forward.tensors[f"cross_cache.layer{layer}.v"])


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


def test_activations_inside_the_network() -> None:
    forward = Forward()
    seen: dict[str, Tensor] = {}
    for name in ACTIVATIONS:
        module = forward.network.get_submodule(name)
        module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.setdefault(name, output))
    forward(forward.tensors["x_block0"], forward.tensors["timesteps"][1], forward.tensors["prompt_embeds.p0"])
    for name, key in ACTIVATIONS.items():
        expected = forward.tensors[key]
        assert_close(seen[name].reshape(expected.shape), expected)


def test_rope_at_full_head_width() -> None:
    _, tensors = golden("dit_tiny_step")
    angles = torch.cat([axis_angles(1024, pairs)[tensors["rope128.rows"]] for pairs in split_pairs(128)], -1)
    assert split_pairs(128) == (22, 21, 21)
    torch.testing.assert_close(angles.cos(), tensors["rope128.cos"], atol=1e-12, rtol=0)
    torch.testing.assert_close(angles.sin(), tensors["rope128.sin"], atol=1e-12, rtol=0)
    tables = RotaryTables(128, 2, 4, frames_per_chunk=1)
    rotated = rotate(tensors["rope128.q"].transpose(1, 2), *tables.of_chunks((5, 6, 7)))
    assert_close(rotated.transpose(1, 2), tensors["rope128.q_rotated_start5"])


def test_time_features_at_full_width() -> None:
    _, tensors = golden("dit_tiny_step")
    torch.testing.assert_close(time_features(tensors["sinus256.t"], 256), tensors["sinus256.emb"], atol=1e-12, rtol=0)


def test_full_size_names_and_shapes_are_the_checkpoint_ones() -> None:
    expected = golden("key_inventory")[0]["dit"]["tensors"]
    with torch.device("meta"):
        network = CausalDiT(PRESETS["longlive-1.3b"].dit)
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == expected
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 1_418_996_800


@torch.inference_mode()
def test_a_full_size_chunk_and_recache_need_no_value_from_the_device() -> None:
    """On the meta device a read-back of any value fails: what passes there cannot wait for a GPU either."""
    config = PRESETS["longlive-1.3b"]
    with torch.device("meta"):
        network = CausalDiT(config.dit)
        latents = torch.empty(1, 12, 16, config.latent_height, config.latent_width)
        text = torch.empty(1, config.dit.text_len, config.dit.text_dim)
    window = Window(config.window)
    for variant in ("base", "infinity"):
        dit = TorchDiT(network, config, 1, variant)
        prompt_kv = dit.embed_prompt(text, 20)
        for chunk in (0, 5):
            flow = dit.denoise(latents[:, :3], 2, prompt_kv, 0, window.step(chunk))
            assert flow.shape == (1, 3, 16, 60, 104)
            dit.commit(latents[:, :3], prompt_kv, 0, window.step(chunk))
        dit.commit(latents[:, :9], prompt_kv, 0, window.recache(5, keep_sink=True))
        dit.commit(latents, prompt_kv, 0, window.recache(5, keep_sink=False))
