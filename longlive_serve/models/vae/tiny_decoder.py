# SPDX-License-Identifier: Apache-2.0
"""TAEHV's decoder as a streaming model: Wan 2.1 latents and a feature cache in, video frames and a new cache out.

An alternative to `decoder.py` with the same interface. Parameter names are those of `taew2_1.pth` of
github.com/madebyollin/taehv (`decoder.*`; the encoder is not built). At 480x832 twelve frames cost 1.58 TFLOP (Wan VAE:
40.65), and a session's cache takes 64 MiB in bfloat16 (Wan VAE: 1.76 GiB). No frame depends on latents more than 8
frames back, so decoding the 12 latents of a session's window restores its cache exactly.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.config.presets import FRAMES_PER_LATENT, TinyDecoderConfig

DOUBLES_TIME = (False, True, True)  # which of the three spatial doublings also doubles time
BLOCKS = 3  # memory blocks before each doubling


class SoftClamp(nn.Module):
    """Soft clamp of latents to (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return (x / 3).tanh() * 3


class MemoryBlock(nn.Module):
    """A residual block over each frame and the one before it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.conv = nn.Sequential(
            _conv(2 * channels, channels), nn.ReLU(), _conv(channels, channels), nn.ReLU(), _conv(channels, channels)
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """x [B, T, C, H, W]; past [B, C, H, W] is the frame before it."""
        earlier = torch.cat([past.unsqueeze(1), x[:, :-1]], dim=1)
        y: Tensor = self.conv(torch.cat([x, earlier], dim=2).flatten(0, 1))
        return F.relu(x + y.reshape(x.shape))


class Grow(nn.Module):
    """Doubles height and width, and expands each frame to `frames` frames."""

    def __init__(self, channels: int, frames: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, frames * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, frames * T, C, 2H, 2W]."""
        batch, _, channels, height, width = x.shape
        # TAEHV upsamples first. A 1x1 convolution before it gives the same result with a quarter of the work.
        y = F.interpolate(self.conv(x.flatten(0, 1)), scale_factor=2)
        return y.reshape(batch, -1, channels, 2 * height, 2 * width)


class TinyDecoder(nn.Module):
    """Streaming decoder: any split of a video's latents into calls gives the same frames, bit for bit.

    The caller owns the cache. A video starts with `initial_cache` and `is_first=True`; each call returns the cache for
    the next one. Neither the list passed in nor its tensors are changed.
    """

    def __init__(self, config: TinyDecoderConfig) -> None:
        super().__init__()
        if len(config.channels) != len(DOUBLES_TIME) + 1:
            raise ValueError(f"tiny decoder: got channels {config.channels}, expected {len(DOUBLES_TIME) + 1} numbers")
        layers: list[nn.Module] = [SoftClamp(), _conv(config.z_dim, config.channels[0]), nn.ReLU()]
        for (channels, following), doubles in zip(itertools.pairwise(config.channels), DOUBLES_TIME, strict=True):
            layers += [MemoryBlock(channels) for _ in range(BLOCKS)]
            layers += [nn.Identity()]  # keeps TAEHV's numbers in parameter names; `Grow` does its upsampling
            layers += [Grow(channels, 2 if doubles else 1), _conv(channels, following, bias=False)]
        head = _conv(config.channels[-1], 3)
        assert head.bias is not None
        nn.init.constant_(head.bias, 0.5)  # untrained output is grey instead of black
        self.decoder = nn.Sequential(*layers, nn.ReLU(), head)

    def initial_cache(
        self, batch: int, latent_height: int, latent_width: int, device: torch.device | str, dtype: torch.dtype
    ) -> list[Tensor]:
        """The cache at the start of a video: zeros [B, C, H, W], the past frame of each block in execution order."""
        cache, scale = [], 1
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                size = (batch, layer.channels, scale * latent_height, scale * latent_width)
                cache.append(torch.zeros(size, device=device, dtype=dtype))
            elif isinstance(layer, Grow):
                scale *= 2
        return cache

    def forward(self, latents: Tensor, cache: Sequence[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        """Decode latents [B, F, 16, h, w] of the DiT; `is_first`: latents[:, 0] is the first of the video.

        Returns frames [B, T, 3, 8h, 8w], not clamped, in the model's dtype, and the new cache. T is 4F, or 4F - 3
        in the first call.
        """
        frames = []
        for latent in latents.split(1, dim=1):  # one by one, so that the split into calls changes no bit
            part, cache = self._decode_latent(latent, cache)
            frames.append(part)
        if is_first:
            frames[0] = frames[0][:, FRAMES_PER_LATENT - 1 :]  # earlier frames come from the empty cache
        return torch.cat(frames, dim=1), list(cache)

    def _decode_latent(self, x: Tensor, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        batch, past, new = len(x), iter(cache), []
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                new.append(x[:, -1].clone())  # a view would keep all frames alive
                x = layer(x, next(past))
            elif isinstance(layer, Grow):
                x = layer(x)
            else:
                x = layer(x.flatten(0, 1)).unflatten(0, (batch, -1))
        assert len(new) == len(cache), f"cache of {len(cache)} tensors for {len(new)} blocks"
        return x * 2 - 1, new  # TAEHV's frames are in [0, 1]


def _conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
