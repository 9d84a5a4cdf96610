# SPDX-License-Identifier: Apache-2.0
"""The Wan VAE decoder with the operators of the reference code, for the eager baseline.

`VAEDecoder` computes the same frames with fewer operations. Here padding is a separate copy, the norm is `normalize`
plus a zero bias, and upsampling runs in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.models.vae.decoder import CausalConv3d, RMSNorm, VAEDecoder


class PaddedConv3d(CausalConv3d):
    def __init__(self, conv: CausalConv3d) -> None:
        with torch.device("meta"):
            super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size[1])
        self.weight, self.bias = conv.weight, conv.bias

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_cpu:
            return super().convolve(x, weight)  # a Conv3d is many times slower on the CPU
        return pad_and_convolve(x, weight, self.bias)


class NormalizeRMSNorm(RMSNorm):
    def __init__(self, norm: RMSNorm) -> None:
        with torch.device("meta"):
            super().__init__(norm.gamma.shape[0], norm.gamma.dim())
        self.gamma = norm.gamma

    def forward(self, x: Tensor) -> Tensor:
        normalized: Tensor = F.normalize(x, dim=1) * self.scale * self.gamma + 0.0
        return normalized


class WideUpsample(nn.Upsample):
    def __init__(self, upsample: nn.Upsample) -> None:
        super().__init__(scale_factor=upsample.scale_factor, mode="nearest-exact")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


def pad_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    side = weight.shape[-1] // 2
    return F.conv3d(F.pad(x, (side, side, side, side, 0, 0)), weight, bias)


def as_reference(model: VAEDecoder) -> VAEDecoder:
    """Replace the operators of `model` in place by the reference's; the weights are shared and stay contiguous."""
    kinds = {CausalConv3d: PaddedConv3d, RMSNorm: NormalizeRMSNorm, nn.Upsample: WideUpsample}
    for name, module in list(model.named_modules()):
        if type(module) in kinds:
            model.set_submodule(name, kinds[type(module)](module))
    return model
