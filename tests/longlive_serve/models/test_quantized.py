# SPDX-License-Identifier: Apache-2.0
"""8-bit numbers and layers: what a quantized checkpoint computes with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from longlive_serve.models.quantization.int8_fp8_layers import QuantizedLinear, install, scale_for, to_8_bit
from longlive_serve.models.vae.decoder import CausalConv3d, FeatureCache
from quantization.checkpoint import InputStats, quantized_layer
from quantization.flow_errors import relative_error
from quantization.recipes import Format

pytestmark = pytest.mark.numeric

INT8, FP8 = Format(dtype=torch.int8), Format(dtype=torch.float8_e4m3fn)
FORMATS = pytest.mark.parametrize("format", [INT8, FP8], ids=str)


@FORMATS
def test_what_8_bits_can_hold_survives(format: Format) -> None:
    scale = scale_for(torch.tensor(3.7), format.dtype)
    codes = torch.arange(-127, 128, dtype=torch.int8) if format == INT8 else torch.arange(256).to(torch.uint8)
    numbers = (codes if format == INT8 else codes.view(torch.float8_e4m3fn)).float()
    numbers = numbers[numbers.isfinite()]
    assert len(numbers) >= 254
    assert torch.equal(to_8_bit(numbers * scale, scale, format.dtype).float(), numbers)


@FORMATS
def test_scales_are_the_same_in_every_precision(format: Format) -> None:
    scales = scale_for(torch.rand(1000) * 100 + 1e-3, format.dtype)
    assert torch.equal(scales.bfloat16().float(), scales)
    assert scale_for(torch.zeros(()), format.dtype).half() > 0


@FORMATS
def test_too_large_inputs_are_clamped(format: Format) -> None:
    scale = scale_for(torch.tensor(1.0), format.dtype)
    assert to_8_bit(torch.tensor([-1e6, 1e6]), scale, format.dtype).float().abs().min() >= 127


def quantized_linear(layer: nn.Linear, x: Tensor, format: Format) -> nn.Module:
    amax = x.flatten(0, -2).abs().amax(0)
    smoothing = None if format.smoothing is None else layer.weight.detach().abs().amax(0).sqrt() / amax.sqrt()
    state = quantized_layer(layer.weight.detach(), format, InputStats(amax=amax, smoothing=smoothing))
    model = nn.Sequential(layer)
    install(model, {"0": state})
    return model


@pytest.mark.parametrize(("format", "most"), [(INT8, 0.012), (FP8, 0.04)], ids=str)
@pytest.mark.parametrize("inputs", [True, False])
def test_a_quantized_layer_is_close_to_its_original(format: Format, most: float, inputs: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(256, 64).requires_grad_(False), torch.randn(8, 256)
    expected = layer(x)
    model = quantized_linear(layer, x, dataclasses.replace(format, inputs=inputs))
    assert isinstance(model[0], QuantizedLinear)  # type: ignore[index]
    assert (model[0].input_scale is not None) == inputs  # type: ignore[index]
    assert 1e-4 < relative_error(model(x), expected) < most


def test_smoothing_helps_where_some_channels_stick_out() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 256) * torch.where(torch.arange(256) % 64 == 0, 50.0, 1.0)
    weight = torch.randn(64, 256) * torch.where(torch.arange(256) % 64 == 0, 0.1, 1.0)
    errors = []
    for smoothing in (None, 0.5):
        layer = nn.Linear(256, 64).requires_grad_(False)
        layer.weight.data.copy_(weight)
        expected = layer(x)
        model = quantized_linear(layer, x, dataclasses.replace(INT8, smoothing=smoothing))
        errors.append(relative_error(model(x), expected))
    assert errors[1] < errors[0] / 4


@FORMATS
def test_a_quantized_convolution_keeps_its_history(format: Format) -> None:
    torch.manual_seed(0)
    layer, x, history = CausalConv3d(16, 8), torch.randn(1, 16, 3, 6, 6), torch.randn(1, 16, 2, 6, 6)
    plain, cache = FeatureCache([history]), FeatureCache([history])
    with torch.no_grad():
        expected = layer(x, plain)
    state = quantized_layer(layer.weight.detach(), format, InputStats(amax=torch.cat([history, x], 2).abs().max()))
    model = nn.ModuleList([layer])
    install(model, {"0": state})
    assert 1e-4 < relative_error(model[0](x, cache), expected) < 0.04
    assert torch.equal(cache.new[0], plain.new[0])
