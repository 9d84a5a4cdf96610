# SPDX-License-Identifier: Apache-2.0
"""The tiny decoder in channels-last memory, which is faster for GPU convolutions, one chunk per call.

Used by the fused backend, with B = 1. It takes over the weights of a `TinyDecoder`, the reference for its results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_serve.config.presets import FRAMES_PER_LATENT
from longlive_serve.models.vae.tiny_decoder import Grow, MemoryBlock, TinyDecoder

LAST = torch.channels_last


class FusedTiny:
    """`TinyDecoder` for one video, with the cache updated in place."""

    def __init__(self, model: TinyDecoder) -> None:
        self.model = model.to(memory_format=LAST)  # type: ignore[call-overload]

    def initial_cache(self, height: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        """As `TinyDecoder.initial_cache`, in channels-last memory."""
        tensors = self.model.initial_cache(1, height, width, device, dtype)
        return [tensor.contiguous(memory_format=LAST) for tensor in tensors]

    def decode(self, latents: Tensor, cache: Sequence[Tensor], is_first: bool) -> Tensor:
        """Decode latents [1, F, 16, h, w] to frames [1, T, 3, 8h, 8w], as `TinyDecoder.forward`.

        Updates the cache in place. With `is_first`, F must be 1.
        """
        assert not is_first or latents.shape[1] == 1
        x, histories = latents[0].contiguous(memory_format=LAST), iter(cache)  # [T, C, H, W] from here on
        for layer in self.model.decoder:
            if isinstance(layer, MemoryBlock):
                x = _with_the_frame_before(layer, x, next(histories))
            elif isinstance(layer, Grow):
                x = _grow(layer, x)
            else:
                x = layer(x)
        frames = x * 2 - 1  # TAEHV's frames are in [0, 1]
        return frames[None, FRAMES_PER_LATENT - 1 :] if is_first else frames[None]


def _with_the_frame_before(block: MemoryBlock, x: Tensor, past: Tensor) -> Tensor:
    earlier = torch.cat([past, x[:-1]])
    past.copy_(x[-1:])
    out: Tensor = F.relu(x + block.conv(torch.cat([x, earlier], dim=1)))
    return out


def _grow(layer: Grow, x: Tensor) -> Tensor:
    """Split the channels into frames before upsampling: this moves less memory than afterwards."""
    y = layer.conv(x)
    frames = y.shape[1] // x.shape[1]
    split = y.unflatten(1, (frames, -1)).flatten(0, 1).contiguous(memory_format=LAST)
    return F.interpolate(split, scale_factor=2)
