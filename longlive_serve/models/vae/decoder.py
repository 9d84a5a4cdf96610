# SPDX-License-Identifier: Apache-2.0
"""The Wan2.1 VAE decoder as a streaming model: latents and a feature cache in, video frames and a new cache out.

Called by the backends. Parameter names are those of Wan2.1_VAE.pth (`decoder.*`, `conv2.*`; the encoder is not built).
It is stateless: the caller owns the cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.config.presets import VAEConfig

HISTORY = 2  # past frames in the receptive field of a three-frame kernel
DOUBLES_TIME = (True, True, False)  # which of the three spatial doublings also doubles time

LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


def to_uint8(frames: Tensor) -> Tensor:
    """Decoded frames [B, T, 3, H, W], clamped to [-1, 1], -> uint8 [B, T, H, W, 3], truncated like the reference."""
    unit = (frames.float().clamp(-1, 1) * 0.5 + 0.5).clamp(0, 1)
    return (unit * 255).to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


class FeatureCache:
    """Cache of one call: gives each cached conv its history, in execution order, and collects the new histories."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._old = iter(tensors)
        self.new: list[Tensor] = []

    def prepend(self, x: Tensor) -> Tensor:
        """Return x [B, C, T, H, W] with its history prepended (T + 2 frames); the last two are the new history."""
        x = torch.cat([next(self._old), x], dim=2)
        self.new.append(x[:, :, -HISTORY:].clone())  # a view would keep all T + 2 frames alive
        return x

    def skip(self) -> None:
        self.new.append(next(self._old))


class CausalConv3d(nn.Conv3d):
    """A convolution over three frames: the current one and the two before it."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(in_channels, out_channels, (3, kernel, kernel), padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:  # type: ignore[override]
        return self.convolve(cache.prepend(x), self.weight)

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """x includes its history."""
        if x.is_cpu and not torch.compiler.is_exporting():
            return self._as_conv2d(x, weight)  # on the CPU PyTorch runs a small Conv3d in a slow fallback
        return F.conv3d(x, weight, self.bias, padding=self.padding)

    def _as_conv2d(self, x: Tensor, weight: Tensor) -> Tensor:
        """The same convolution with the three frames of each window stacked as channels."""
        windows = x.unfold(2, HISTORY + 1, 1).permute(0, 2, 1, 5, 3, 4).flatten(2, 3)  # [B, T, 3C, H, W]
        y = F.conv2d(windows.flatten(0, 1), weight.flatten(1, 2), self.bias, padding=self.padding[1:])
        return y.reshape(*windows.shape[:2], *y.shape[1:]).transpose(1, 2)


class RMSNorm(nn.Module):
    """RMS norm over the channels (dim 1). `axes`: number of dims without the batch."""

    def __init__(self, channels: int, axes: int = 4) -> None:
        super().__init__()
        self.scale = channels**0.5
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * (axes - 1)))

    def forward(self, x: Tensor) -> Tensor:
        # Equals F.normalize, whose norm over any but the last dim is slow on the CPU.
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = x.square().sum(1, keepdim=True, dtype=wide).sqrt().to(x.dtype)
        y: Tensor = x / norm.clamp_min(1e-12) * self.scale * self.gamma
        return y


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_channels),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels),
            RMSNorm(out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout in training; keeps the numbers in parameter names
            CausalConv3d(out_channels, out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def normed_convolutions(self) -> Iterator[tuple[RMSNorm, CausalConv3d]]:
        """The two convolutions, each with the norm before it; a SiLU lies between norm and convolution."""
        for norm, conv in ((self.residual[0], self.residual[2]), (self.residual[3], self.residual[6])):
            assert isinstance(norm, RMSNorm)
            assert isinstance(conv, CausalConv3d)
            yield norm, conv

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        shortcut: Tensor = self.shortcut(x)
        return shortcut + _run(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Single-head attention over the positions within each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(channels, axes=3)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, frames, height, width = x.shape
        y: Tensor = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        qkv = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B*T, 1, H*W, 3C]
        y = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        y = self.proj(y.squeeze(1).transpose(1, 2).reshape(batch * frames, channels, height, width))
        return x + y.reshape(batch, frames, channels, height, width).transpose(1, 2)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `doubles_time` also doubles the frames."""

    def __init__(self, channels: int, doubles_time: bool) -> None:
        super().__init__()
        # Registered in execution order: `initial_cache` relies on it.
        self.time_conv = CausalConv3d(channels, 2 * channels, kernel=1) if doubles_time else None
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(channels, channels // 2, 3, padding=1))

    def forward(self, x: Tensor, cache: FeatureCache, is_first: bool) -> Tensor:
        if self.time_conv is not None and is_first:
            cache.skip()  # the first latent yields one frame and does not enter this conv's history
        elif self.time_conv is not None:
            earlier, later = self.time_conv(x, cache).chunk(2, dim=1)
            x = torch.stack([earlier, later], dim=3).flatten(2, 3)
        batch, _, frames, _, _ = x.shape
        y: Tensor = self.resample(x.transpose(1, 2).flatten(0, 1))
        return y.reshape(batch, frames, *y.shape[1:]).transpose(1, 2)


class Decoder(nn.Module):
    """Latent features -> pixels, one latent frame per call."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.base_dim * mult for mult in (config.dim_mult[-1], *reversed(config.dim_mult))]
        top, base = widths[0], widths[-1]
        self.conv1 = CausalConv3d(config.z_dim, top)
        self.middle = nn.Sequential(ResidualBlock(top, top), AttentionBlock(top), ResidualBlock(top, top))
        upsamples: list[nn.Module] = []
        for stage, (channels, out_channels) in enumerate(itertools.pairwise(widths)):
            if stage > 0:
                channels //= 2  # noqa: PLW2901  (the upsampling before this stage halved them)
            for _ in range(config.num_res_blocks + 1):
                upsamples.append(ResidualBlock(channels, out_channels))
                channels = out_channels  # noqa: PLW2901
            if stage < len(DOUBLES_TIME):
                upsamples.append(Upsample(out_channels, DOUBLES_TIME[stage]))
        self.upsamples = nn.Sequential(*upsamples)
        self.head = nn.Sequential(RMSNorm(base), nn.SiLU(), CausalConv3d(base, 3))

    def forward(self, x: Tensor, cache: FeatureCache, is_first: bool) -> Tensor:
        x = _run(self.middle, self.conv1(x, cache), cache)
        x = _run(self.upsamples, x, cache, is_first)
        return _run(self.head, x, cache)


class VAEDecoder(nn.Module):
    """Streaming decoder: any split of a video's latents into calls gives the same frames, bit for bit.

    The caller owns the cache. A video starts with `initial_cache` and `is_first=True`; each call returns the cache for
    the next one. Neither the list passed in nor its tensors are changed, but the new list may share tensors with it.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        if config.z_dim != len(LATENT_MEAN) or len(config.dim_mult) != len(DOUBLES_TIME) + 1:
            raise ValueError(
                f"VAE: got z_dim {config.z_dim} and dim_mult {config.dim_mult}, "
                f"expected {len(LATENT_MEAN)} and {len(DOUBLES_TIME) + 1} numbers"
            )
        # On the CPU even when built on the meta device: no checkpoint contains them.
        self.register_buffer("mean", torch.tensor(LATENT_MEAN, device="cpu").view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(LATENT_STD, device="cpu").view(-1, 1, 1), persistent=False)
        self.conv2 = nn.Conv3d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def initial_cache(
        self, batch: int, latent_height: int, latent_width: int, device: torch.device | str, dtype: torch.dtype
    ) -> list[Tensor]:
        """The cache at the start of a video: zeros [B, C, 2, H, W], one per cached conv in execution order."""
        cache, scale = [], 1
        for module in self.decoder.modules():
            if isinstance(module, CausalConv3d):
                size = (batch, module.in_channels, HISTORY, scale * latent_height, scale * latent_width)
                cache.append(torch.zeros(size, device=device, dtype=dtype))
            elif isinstance(module, nn.Upsample):
                scale *= 2
        return cache

    def forward(self, latents: Tensor, cache: Sequence[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        """Decode latents [B, F, 16, h, w]; `is_first`: latents[:, 0] is the first of the video.

        Returns frames [B, T, 3, 8h, 8w], not clamped, in the model's dtype, and the new cache. T is 4F, or 4F - 3
        in the first call.
        """
        frames = []
        for index, latent in enumerate(latents.unbind(1)):
            part, cache = self.decode_latent(latent, cache, is_first and index == 0)
            frames.append(part)
        return torch.cat(frames, dim=1), list(cache)

    def decode_latent(self, latent: Tensor, cache: Sequence[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        """Decode one latent frame [B, 16, h, w]: frames [B, 4, 3, 8h, 8w] (1 frame if `is_first`) and the new cache."""
        mean, std = self.mean.to(latent.dtype), self.std.to(latent.dtype)
        x = latent / (1.0 / std) + mean  # the same order of rounding as the reference
        features = FeatureCache(cache)
        frames = self.decoder(self.conv2(x.unsqueeze(2)), features, is_first)
        assert len(features.new) == len(cache), f"cache of {len(cache)} tensors for {len(features.new)} convs"
        return frames.transpose(1, 2), features.new


def _run(layers: nn.Sequential, x: Tensor, cache: FeatureCache, is_first: bool = False) -> Tensor:
    for layer in layers:
        if isinstance(layer, Upsample):
            x = layer(x, cache, is_first)
        elif isinstance(layer, CausalConv3d | ResidualBlock):
            x = layer(x, cache)
        else:
            x = layer(x)
    return x
