# SPDX-License-Identifier: Apache-2.0
"""Scales of FP8: nothing exceeds them, and not much of the format is given away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from longlive_serve.config.presets import DIT, PRESETS, DiTConfig
from longlive_serve.models.dit.adaln import Modulation, modulation
from longlive_serve.models.dit.causal_dit import Block, CausalDiT, modulate
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.rope import rotate
from longlive_serve.models.quantization.fp8_scale_bounds import attention_scales, silu_scale
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8
from longlive_serve.models.vae.decoder import RMSNorm
from longlive_serve.weights.loader import load_model
from training.quality.__main__ import SHIPPED

pytestmark = pytest.mark.numeric

LEVELS = [*FlowMatchScheduler("cpu").timesteps, torch.zeros(())]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["tiny", "demo"])
def model(request: pytest.FixtureRequest) -> CausalDiT:
    weights = str(SHIPPED) if request.param == "demo" else "random"
    built: CausalDiT = load_model(DIT, PRESETS[request.param], weights, "cpu", torch.float32)
    return built


def largest(block: Block, x: Tensor, level: Modulation, layer: int) -> Tensor:
    """Of the queries, keys and values of tokens x [1, L, D] at a noise level, turned as far as RoPE may."""
    shift, scale = level.blocks[layer, :2, None, None]
    z = modulate(block.norm1(x), shift, scale)
    angle = torch.full((x.shape[1], block.self_attn.q.out_features // block.self_attn.num_heads // 2), torch.pi / 4)
    heads = [block.self_attn.queries(z), block.self_attn.keys(z)]
    turned = [torch.stack([h, rotate(h, angle.cos(), angle.sin())]).abs().max() for h in heads]
    return torch.stack([*turned, block.self_attn.values(z).abs().max()])


def test_what_tokens_come_to_is_far_from_the_bounds_and_not_too_far(model: CausalDiT) -> None:
    levels = [modulation(model, level) for level in LEVELS]
    bounds = attention_scales(model, levels) * LARGEST_FP8
    x = torch.randn(1, 300, model.config.dim, generator=torch.Generator().manual_seed(0))
    for layer, block in enumerate(model.blocks):
        found = torch.stack([largest(block, x, level, layer) for level in levels]).amax(0)
        assert (found < bounds[layer]).all()
        assert (found > bounds[layer] / 2**8).all()  # E4M3 has 15 binades


@pytest.mark.parametrize("part", [0, 1, 2])
def test_no_token_exceeds_a_bound_and_the_worst_one_reaches_it(part: int) -> None:
    """The worst: all of it in the one direction that the projection makes most of."""
    config = DiTConfig(dim=64, num_heads=2, num_layers=1, ffn_dim=64, freq_dim=64, text_len=8, text_dim=8)
    model = CausalDiT(config)
    attention = model.blocks[0].self_attn
    level = Modulation(blocks=torch.zeros(1, 6, 64), head=torch.zeros(2, 64))
    x = torch.zeros(1, 1, 64)
    x[..., 0], x[..., 1] = 1000.0, -1000.0  # LayerNorm takes away the mean, and leaves a length of sqrt(D)
    projection = (attention.q, attention.k, attention.v)[part]
    projection.weight.zero_()
    projection.bias.zero_()
    projection.weight[5, 0], projection.weight[5, 1] = 2.0, -2.0
    found = largest(model.blocks[0], x, level, 0)[part]
    bound = attention_scales(model, [level])[0, part] * LARGEST_FP8
    assert bound * 0.99 < found < bound * 1.00001


def test_no_position_exceeds_the_bound_of_silu_and_the_worst_one_reaches_it() -> None:
    norm = RMSNorm(96)
    norm.gamma.copy_(torch.randn(96, 1, 1, 1, generator=torch.Generator().manual_seed(0)))
    bound = silu_scale(norm) * LARGEST_FP8
    x = torch.randn(1, 96, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    assert bound / 2**4 < torch.nn.functional.silu(norm(x)).abs().max() < bound
    largest = norm.gamma.abs().argmax()
    x.zero_()[:, largest] = norm.gamma[largest].sign() * 5
    assert bound * 0.99 < torch.nn.functional.silu(norm(x)).abs().max() <= bound * 1.00001
