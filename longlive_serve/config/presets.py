# SPDX-License-Identifier: Apache-2.0
"""Sizes of the models, and the presets by name."""

from __future__ import annotations

import dataclasses
from typing import Any

FPS = 16  # video frames per second that the model was trained for
FRAMES_PER_LATENT = 4  # video frames per latent frame; the first latent frame gives 1
TEXT_ENCODER, DIT, VAE_DECODER = MODELS = ("text_encoder", "dit", "vae_decoder")
WAN, TINY = DECODERS = ("wan", "tiny")  # models that decode latents
TINY_DECODER = "tiny_decoder"  # the model that replaces the VAE decoder with `decoder = "tiny"`


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the causal DiT, under the names of the reference's config.json."""

    dim: int
    num_heads: int
    num_layers: int
    ffn_dim: int
    freq_dim: int
    text_len: int
    text_dim: int
    channels: int = 16
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of the Wan VAE decoder. One latent pixel becomes 8x8 video pixels."""

    base_dim: int
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_dim: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyDecoderConfig:
    """Sizes of TAEHV's decoder: channels before each of three upsamplings and after the last. Default: as published."""

    channels: tuple[int, ...] = (256, 128, 64, 64)
    z_dim: int = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the umT5 encoder. `dim` must equal the DiT's `text_dim`."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    head_dim: int = 64
    num_buckets: int = 32
    max_distance: int = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowConfig:
    """Sizes in the KV cache, in latent frames: a chunk, the whole window, and its sink, which is never evicted."""

    chunk: int = 3
    window: int = 12
    sink: int = 3

    def __post_init__(self) -> None:
        if self.chunk < 1 or self.sink < 0 or self.window % self.chunk or self.sink % self.chunk:
            raise ValueError(
                f"window: got chunk {self.chunk}, window {self.window}, sink {self.sink}; "
                "expected window and sink to be multiples of the chunk"
            )
        if self.window < self.sink + self.chunk:
            raise ValueError(
                f"window: got {self.window} frames, expected at least sink + chunk = {self.sink + self.chunk}"
            )

    @property
    def chunk_frames(self) -> int:
        """Video frames of every chunk except the first."""
        return self.chunk * FRAMES_PER_LATENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One size of LongLive: its three models, the tiny decoder, the latent size and the window."""

    name: str
    dit: DiTConfig
    vae: VAEConfig
    text_encoder: TextEncoderConfig
    latent_height: int
    latent_width: int
    window: WindowConfig = WindowConfig()
    tiny_decoder: TinyDecoderConfig = TinyDecoderConfig()

    @property
    def tokens_per_frame(self) -> int:
        return (self.latent_height // 2) * (self.latent_width // 2)

    @classmethod
    def from_sizes(cls, sizes: dict[str, Any]) -> ModelConfig:
        """The inverse of `dataclasses.asdict` without the tiny decoder, after JSON."""
        kinds = {"dit": DiTConfig, "vae": VAEConfig, "text_encoder": TextEncoderConfig, "window": WindowConfig}
        parts = {
            key: kind(**{name: tuple(size) if isinstance(size, list) else size for name, size in sizes[key].items()})
            for key, kind in kinds.items()
        }
        return cls(**sizes | parts)

    @property
    def video_size(self) -> tuple[int, int]:
        """Height and width of a video frame in pixels."""
        return 8 * self.latent_height, 8 * self.latent_width


PRESETS: dict[str, ModelConfig] = {
    config.name: config
    for config in (
        ModelConfig(
            name="longlive-1.3b",
            dit=DiTConfig(
                dim=1536, num_heads=12, num_layers=30, ffn_dim=8960, freq_dim=256, text_len=512, text_dim=4096
            ),
            vae=VAEConfig(base_dim=96),
            text_encoder=TextEncoderConfig(vocab_size=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24),
            latent_height=60,
            latent_width=104,
        ),
        ModelConfig(
            name="demo",  # faster than real time on two CPU cores; its trained weights are shipped
            dit=DiTConfig(dim=128, num_heads=4, num_layers=5, ffn_dim=512, freq_dim=256, text_len=32, text_dim=64),
            vae=VAEConfig(base_dim=16, num_res_blocks=1),
            tiny_decoder=TinyDecoderConfig(channels=(64, 32, 16, 16)),
            text_encoder=TextEncoderConfig(vocab_size=64, dim=64, ffn_dim=128, num_heads=4, num_layers=2, head_dim=16),
            latent_height=8,
            latent_width=8,
        ),
        ModelConfig(
            name="tiny",  # for tests; not square on purpose
            dit=DiTConfig(dim=64, num_heads=2, num_layers=2, ffn_dim=128, freq_dim=64, text_len=64, text_dim=32),
            vae=VAEConfig(base_dim=4, num_res_blocks=1),
            tiny_decoder=TinyDecoderConfig(channels=(16, 8, 4, 4)),
            text_encoder=TextEncoderConfig(vocab_size=384, dim=32, ffn_dim=64, num_heads=2, num_layers=1, head_dim=16),
            latent_height=4,
            latent_width=6,
        ),
    )
}
