# SPDX-License-Identifier: Apache-2.0
"""Layers with 8-bit weights and, if an input scale is known, 8-bit inputs: INT8 or FP8 (E4M3), symmetric.

Created by `quantization/`, installed by `weights.checkpoint`. PyTorch simulates them (it rounds to 8 bits and computes
in the model's dtype). Exported, they are QuantizeLinear and DequantizeLinear around the operator, which TensorRT fuses
into 8-bit kernels. Scales are exact in bfloat16, so every precision uses the same ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.models.vae.decoder import CausalConv3d, FeatureCache

LARGEST_FP8 = 448.0  # of E4M3
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: LARGEST_FP8}
"""The largest number of each 8-bit dtype; the largest absolute value of a tensor is mapped to it."""
STATE = ("quantized_weight", "weight_scale", "input_scale", "smoothing")


def scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale that maps `amax` (any shape) to the largest number of `dtype`: float32, rounded to bfloat16."""
    tiny = torch.finfo(torch.float16).tiny  # so that float16 can represent it too
    return (amax.float() / LARGEST[dtype]).clamp_min(tiny).bfloat16().float()


def to_8_bit(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x / scale, rounded to `dtype` and clamped to its range, as QuantizeLinear does."""
    scaled = x / scale
    if dtype == torch.int8:
        return scaled.round().clamp(-128, 127).to(dtype)
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


class QuantizedLayer(nn.Module):
    """Base class of the quantized layers. The buffers are named as in a quantized checkpoint."""

    quantized_weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    smoothing: Tensor | None
    zeros: Tensor
    zero: Tensor
    bias: Tensor | None

    def _set(self, state: dict[str, Tensor], bias: Tensor | None) -> None:
        """state: quantized_weight (8 bits), weight_scale float32 [out]; input_scale float32 [] if inputs are quantized;
        with SmoothQuant, smoothing float32 [in] is multiplied into the inputs (the weights hold its inverse)."""
        for name in STATE:
            self.register_buffer(name, state.get(name))
        zeros = torch.zeros(len(self.weight_scale), dtype=self.bits)
        self.register_buffer("zeros", zeros.to(self.weight_scale.device), persistent=False)
        self.register_buffer("zero", self.zeros[0].clone(), persistent=False)  # TensorRT needs it stored, not sliced
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.register_parameter("weight", None)  # transformers' umT5 reads weight.dtype unless weight is None

    def hold_scales_in(self, dtype: torch.dtype) -> None:
        """Store the scales, which are exact in every float dtype, in `dtype`: for the exporter, as TensorRT needs them
        stored in the dtype of the computation, without a cast."""
        for name in ("weight_scale", "input_scale", "smoothing"):
            scale = getattr(self, name)
            setattr(self, name, None if scale is None else scale.to(dtype))

    @property
    def bits(self) -> torch.dtype:
        """int8 or float8_e4m3fn."""
        return self.quantized_weight.dtype

    def quantize(self, x: Tensor) -> Tensor:
        """The inputs after smoothing and rounding to 8 bits, in x's dtype."""
        if self.smoothing is not None:
            x = x * self.smoothing.to(x.dtype)
        if self.input_scale is None:
            return x
        scale, zero = self.input_scale.to(x.dtype), self.zero
        if torch.compiler.is_exporting():
            q = torch.onnx.ops.symbolic("QuantizeLinear", (x, scale, zero), dtype=self.bits, shape=x.shape)
            return torch.onnx.ops.symbolic("DequantizeLinear", (q, scale, zero), dtype=x.dtype, shape=x.shape)
        return to_8_bit(x, scale, self.bits).to(x.dtype) * scale

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight."""
        weight, scale = self.quantized_weight, self.weight_scale.to(dtype)
        if torch.compiler.is_exporting():
            inputs = (weight, scale, self.zeros)
            return torch.onnx.ops.symbolic("DequantizeLinear", inputs, {"axis": 0}, dtype=dtype, shape=weight.shape)
        return weight.to(dtype) * scale.view(-1, *[1] * (weight.dim() - 1))


class QuantizedLinear(QuantizedLayer):
    """Replaces an nn.Linear."""

    def __init__(self, layer: nn.Linear, state: dict[str, Tensor]) -> None:
        super().__init__()
        self._set(state, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantize(x), self.weight_in(x.dtype), self.bias)


class QuantizedConv2d(QuantizedLayer):
    """Replaces an nn.Conv2d."""

    def __init__(self, layer: nn.Conv2d, state: dict[str, Tensor]) -> None:
        super().__init__()
        self._set(state, layer.bias)
        self.padding = layer.padding

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.quantize(x), self.weight_in(x.dtype), self.bias, padding=self.padding)


class QuantizedCausalConv3d(QuantizedLayer, CausalConv3d):
    """Replaces a CausalConv3d. Its feature cache stays in the model's dtype."""

    def __init__(self, layer: CausalConv3d, state: dict[str, Tensor]) -> None:
        with torch.device("meta"):
            CausalConv3d.__init__(self, layer.in_channels, layer.out_channels, layer.kernel_size[1])
        del self.weight
        self._set(state, layer.bias)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        x = self.quantize(cache.prepend(x))
        return self.convolve(x, self.weight_in(x.dtype))


_KINDS: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv2d: QuantizedConv2d,
    CausalConv3d: QuantizedCausalConv3d,
}


def install(model: nn.Module, states: dict[str, dict[str, Tensor]]) -> None:
    """Replace the layers named in `states` by quantized layers with these states. Bias and dtype do not change.

    Call this last: the dtype of a model with quantized layers must not change.
    """
    for name, state in states.items():
        layer = model.get_submodule(name)
        model.set_submodule(name, _KINDS[type(layer)](layer, state))


def quantized_layers(state: dict[str, Tensor], device: torch.device | str) -> dict[str, dict[str, Tensor]]:
    """The states of the quantized layers in a checkpoint, by layer name, for `install`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key in state:
        if key.endswith(".quantized_weight"):
            name = key.removesuffix(".quantized_weight")
            own = {part: state.get(f"{name}.{part}") for part in STATE}
            layers[name] = {part: tensor.to(device) for part, tensor in own.items() if tensor is not None}
    return layers
