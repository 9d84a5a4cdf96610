# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder with few passes over memory: channels last, one kernel for norm and SiLU that writes into the
convolution's input, convolutions before spatial upsampling instead of after it, optional FP8.

Used by the fused backend, with B = 1. It takes over the weights of a `VAEDecoder`, the reference for its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.kernels.norm_silu import norm_silu
from longlive_serve.models.quantization.fp8_scale_bounds import silu_scale
from longlive_serve.models.quantization.int8_fp8_layers import LARGEST_FP8, to_8_bit
from longlive_serve.models.vae.decoder import (
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
    """Nearest-neighbor upsampling by 2 and a 3x3 convolution, as one 2x2 convolution before the upsampling.

    Each of the four output pixels of an input pixel depends on only 2x2 input pixels, so the weights of taps that read
    the same pixel are summed. This takes 16 multiplications instead of 36 and never stores the upsampled image.
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
    """Merge the three taps along `dim` into two: for the even and for the odd pixels of the upsampled image."""
    first, middle, last = weight.split(1, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8Weights:
    """A convolution with FP8 (E4M3) weights and inputs. `take` frees the layer's own weight."""

    weight: Tensor
    """[C', C, 3, 3, 3], channels last, with one scale per output channel."""
    input_scale: float
    scale: Tensor
    """float32 [1, C', 1, 1, 1]: input scale times weight scale."""
    bias: Tensor
    """float32 [1, C', 1, 1, 1]."""

    @classmethod
    def take(cls, norm: RMSNorm, conv: CausalConv3d) -> FP8Weights:
        assert conv.bias is not None
        input_scale, weight = silu_scale(norm), conv.weight.float()
        scale = weight.abs().amax((1, 2, 3, 4), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_FP8
        conv.weight = None  # type: ignore[assignment]
        return cls(
            weight=to_8_bit(weight, scale, torch.float8_e4m3fn).contiguous(memory_format=LAST),
            input_scale=input_scale.item(),
            scale=(scale * input_scale).view(1, -1, 1, 1, 1),
            bias=conv.bias.float().view(1, -1, 1, 1, 1),
        )


Convolve = Callable[[Tensor, FP8Weights, torch.dtype, Tensor | None], Tensor]
"""(x [1, C, T + 2, H, W], weights, output dtype, tensor to add or None) -> [1, C', T, H, W]."""


@dataclasses.dataclass
class Sum:
    """A layer's output [1, C, T, H, W] with pending additions, which the next kernel does while it reads x: PyTorch's
    convolutions add the bias in a separate pass over memory."""

    x: Tensor
    bias: Tensor | None = None
    added: Tensor | None = None

    def whole(self) -> Tensor:
        if self.bias is not None:
            self.x += self.bias.view(-1, 1, 1, 1)
        if self.added is not None:
            self.x += self.added
        self.bias = self.added = None
        return self.x

    def norm_silu(self, norm: RMSNorm, out: Tensor, scale: float | None, keep: bool) -> None:
        """out = SiLU(norm(sum)). `keep`: also store the sum in x."""
        norm_silu(self.x, norm.gamma.flatten(), out, scale, bias=self.bias, added=self.added, keep=keep)
        if keep:
            self.bias = self.added = None


class FusedVAE:
    """`VAEDecoder` for one video, with the cache updated in place. Takes over weights and biases of the model."""

    def __init__(self, model: VAEDecoder, convolve: Convolve | None = None) -> None:
        """convolve: computes the residual blocks' convolutions, nearly all the work, in FP8. None: no FP8."""
        self.model, self._convolve_fp8 = model, convolve
        blocks = [block for block in model.modules() if isinstance(block, ResidualBlock)]
        pairs = [pair for block in blocks for pair in block.normed_convolutions()] if convolve else []
        self._fp8 = {conv: FP8Weights.take(norm, conv) for norm, conv in pairs}
        for layer in model.modules():
            if isinstance(layer, nn.Conv3d) and layer not in self._fp8:
                layer.weight = nn.Parameter(layer.weight.contiguous(memory_format=LAST), requires_grad=False)
        self._biases = {}
        """Biases of the convolutions before a norm, removed from the layers: the norm's kernel adds them."""
        for conv in (model.decoder.conv1, *(conv for block in blocks for _, conv in block.normed_convolutions())):
            if conv not in self._fp8:
                self._biases[conv], conv.bias = conv.bias, None
        self._doubling = {
            layer: DoublingConv(layer.resample[1])  # type: ignore[arg-type]
            for layer in model.decoder.upsamples
            if isinstance(layer, Upsample)
        }

    def initial_cache(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """As `VAEDecoder.initial_cache`, in channels-last memory; the histories of FP8 convolutions are FP8."""
        tensors = self.model.initial_cache(1, height, width, device, dtype)
        convs = [module for module in self.model.decoder.modules() if isinstance(module, CausalConv3d)]
        dtypes = [torch.float8_e4m3fn if conv in self._fp8 else dtype for conv in convs]
        return [x.to(of).contiguous(memory_format=LAST) for x, of in zip(tensors, dtypes, strict=True)]

    def decode(self, latents: Tensor, cache: Sequence[Tensor], is_first: bool) -> Tensor:
        """Decode latents [1, F, 16, h, w] to frames [1, T, 3, 8h, 8w], as `VAEDecoder.forward`.

        Updates the cache (channels-last memory) in place. With `is_first`, F must be 1.
        """
        assert not is_first or latents.shape[1] == 1
        mean, std = self.model.mean.to(latents.dtype), self.model.std.to(latents.dtype)
        x = latents / (1.0 / std) + mean
        x = self.model.conv2(x.transpose(1, 2).contiguous(memory_format=LAST))
        decoder, histories = self.model.decoder, iter(cache)
        stream = self._convolve(decoder.conv1, Sum(x), None, histories)
        for layer in (*decoder.middle, *decoder.upsamples):
            if isinstance(layer, ResidualBlock):
                stream = self._residual(layer, stream, histories)
            elif isinstance(layer, Upsample):
                stream = Sum(self._upsample(layer, stream.whole(), histories, is_first))
            else:
                assert isinstance(layer, AttentionBlock)
                stream = Sum(layer(stream.whole()).contiguous(memory_format=LAST))
        norm, _, conv = decoder.head
        return self._convolve(conv, stream, norm, histories).whole().transpose(1, 2)

    def _residual(self, block: ResidualBlock, x: Sum, histories: Iterator[Tensor]) -> Sum:
        (first_norm, first), (second_norm, second) = block.normed_convolutions()
        y = self._convolve(first, x, first_norm, histories, keep=True)
        shortcut = block.shortcut(x.whole()).contiguous(memory_format=LAST)
        return self._convolve(second, y, second_norm, histories, added=shortcut)

    def _upsample(self, layer: Upsample, x: Tensor, histories: Iterator[Tensor], is_first: bool) -> Tensor:
        if layer.time_conv is not None and is_first:
            next(histories)  # not used, as in `Upsample`
        elif layer.time_conv is not None:
            both = self._convolve(layer.time_conv, Sum(x), None, histories).whole()
            _, channels, count, height, width = x.shape
            size = (1, channels, 2 * count, height, width)
            x = torch.empty(size, device=x.device, dtype=x.dtype, memory_format=LAST)
            x[:, :, 0::2], x[:, :, 1::2] = both.chunk(2, dim=1)
        return self._doubling[layer](x)

    def _convolve(
        self,
        conv: nn.Module,
        x: Sum,
        norm: nn.Module | None,
        histories: Iterator[Tensor],
        added: Tensor | None = None,
        keep: bool = False,
    ) -> Sum:
        """Cached convolution of x, or of SiLU(norm(x)) with `norm`, plus `added`. `keep`: x is used afterwards."""
        assert isinstance(conv, CausalConv3d)
        history, fp8 = next(histories), self._fp8.get(conv)
        _, channels, count, height, width = x.x.shape
        size = (1, channels, HISTORY + count, height, width)
        wide = torch.empty(size, device=history.device, dtype=history.dtype, memory_format=LAST)
        wide[:, :, :HISTORY] = history
        if norm is None:
            wide[:, :, HISTORY:] = x.whole()
        else:
            assert isinstance(norm, RMSNorm)
            x.norm_silu(norm, wide[:, :, HISTORY:], fp8.input_scale if fp8 else None, keep)
        history.copy_(wide[:, :, -HISTORY:])
        if fp8 is not None:
            assert self._convolve_fp8 is not None
            return Sum(self._convolve_fp8(wide, fp8, x.x.dtype, added))
        out = conv.convolve(wide, conv.weight).contiguous(memory_format=LAST)
        return Sum(out, self._biases.get(conv), added)
