# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder in as few passes over memory as its arithmetic allows: channels last, norm and SiLU in one kernel
that writes where the convolution reads, convolutions before the doubling of the picture instead of behind it.

Called by the fused engine, with B = 1. It takes the weights of a `VAEDecoder`, which says what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.kernels.norm_silu import norm_silu
from longlive_serve.models.vae_decoder import (
    HISTORY,
    AttentionBlock,
    CausalConv3d,
    ResidualBlock,
    RMSNorm,
    Upsample,
    VAEDecoder,
)

LAST = torch.channels_last_3d


class DoublingConv:
    """Nearest doubling of height and width, then the 3x3 convolution, as one 2x2 convolution before the doubling.

    Each of the four pixels that come of one sees only 2x2 pixels of the smaller picture: those that fall together have
    their weights added up. 16 products instead of 36, and the doubled picture is never stored.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        rows = _pairs_of_taps(conv.weight.float(), 2)
        phases = [taps for part in rows for taps in _pairs_of_taps(part, 3)]
        weight = torch.cat(phases).to(conv.weight.dtype)
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        assert conv.bias is not None
        self.bias = conv.bias.repeat(4)

    def __call__(self, x: Tensor) -> Tensor:
        """x [1, C, T, H, W] -> [1, C', T, 2H, 2W]."""
        frames = F.pad(x[0].transpose(0, 1), (1, 1, 1, 1))
        phases = F.conv2d(frames, self.weight, self.bias).chunk(4, dim=1)  # [T, C', H + 1, W + 1] each
        _, _, count, height, width = x.shape
        size = (1, phases[0].shape[1], count, 2 * height, 2 * width)
        out = torch.empty(size, device=x.device, dtype=x.dtype, memory_format=LAST)
        for number, phase in enumerate(phases):
            down, right = divmod(number, 2)
            pixels = phase[..., down : down + height, right : right + width]
            out[:, :, :, down::2, right::2] = pixels.transpose(0, 1)
        return out


def _pairs_of_taps(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The three taps of a convolution along `dim` as two, for the even and the odd pixels of a doubled picture."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


class FusedVAE:
    """As `VAEDecoder`, for one video, with the cache changed in place."""

    def __init__(self, network: VAEDecoder) -> None:
        self.network = network
        for layer in network.modules():
            if isinstance(layer, nn.Conv3d):
                layer.weight = nn.Parameter(layer.weight.contiguous(memory_format=LAST), requires_grad=False)
        self._doubling = {
            layer: DoublingConv(layer.resample[1])  # type: ignore[arg-type]
            for layer in network.decoder.upsamples
            if isinstance(layer, Upsample)
        }

    def decode(self, latents: Tensor, cache: Sequence[Tensor], opening: bool) -> Tensor:
        """Latents [1, F, 16, h, w] -> frames [1, T, 3, 8h, 8w], as `VAEDecoder.forward` gives them.

        The cache, in channels-last memory, becomes that for the next call. With `opening` F is 1.
        """
        assert not opening or latents.shape[1] == 1
        mean, std = self.network.mean.to(latents.dtype), self.network.std.to(latents.dtype)
        x = latents / (1.0 / std) + mean
        x = self.network.conv2(x.transpose(1, 2).contiguous(memory_format=LAST))
        decoder, histories = self.network.decoder, iter(cache)
        x = self._convolve(decoder.conv1, x, None, histories)
        for layer in (*decoder.middle, *decoder.upsamples):
            if isinstance(layer, ResidualBlock):
                x = self._residual(layer, x, histories)
            elif isinstance(layer, Upsample):
                x = self._upsample(layer, x, histories, opening)
            else:
                assert isinstance(layer, AttentionBlock)
                x = layer(x).contiguous(memory_format=LAST)
        norm, _, conv = decoder.head
        return self._convolve(conv, x, norm, histories).transpose(1, 2)

    def _residual(self, block: ResidualBlock, x: Tensor, histories: Iterator[Tensor]) -> Tensor:
        first_norm, _, first, second_norm, _, _, second = block.residual
        y = self._convolve(first, x, first_norm, histories)
        y = self._convolve(second, y, second_norm, histories)
        out: Tensor = y + block.shortcut(x)
        return out

    def _upsample(self, layer: Upsample, x: Tensor, histories: Iterator[Tensor], opening: bool) -> Tensor:
        if layer.time_conv is not None and opening:
            next(histories)  # as `Upsample` does
        elif layer.time_conv is not None:
            both = self._convolve(layer.time_conv, x, None, histories)
            _, channels, count, height, width = x.shape
            size = (1, channels, 2 * count, height, width)
            x = torch.empty(size, device=x.device, dtype=x.dtype, memory_format=LAST)
            x[:, :, 0::2], x[:, :, 1::2] = both.chunk(2, dim=1)
        return self._doubling[layer](x)

    def _convolve(self, conv: nn.Module, x: Tensor, norm: nn.Module | None, histories: Iterator[Tensor]) -> Tensor:
        """The cached convolution of x, or with `norm` of SiLU(norm(x)), behind its history."""
        assert isinstance(conv, CausalConv3d)
        history = next(histories)
        _, channels, count, height, width = x.shape
        size = (1, channels, HISTORY + count, height, width)
        wide = torch.empty(size, device=x.device, dtype=x.dtype, memory_format=LAST)
        wide[:, :, :HISTORY] = history
        if norm is None:
            wide[:, :, HISTORY:] = x
        else:
            assert isinstance(norm, RMSNorm)
            norm_silu(x, norm.gamma.flatten(), wide[:, :, HISTORY:])
        history.copy_(wide[:, :, -HISTORY:])
        return conv.convolve(wide, conv.weight).contiguous(memory_format=LAST)
