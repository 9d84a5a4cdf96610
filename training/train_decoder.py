# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model's VAE decoder: `python -m training.train_decoder --out FOLDER`.

Trains the decoder of `longlive_serve` through its streaming forward, on latents of drawn clips. Ctrl-C stops a run; run
again, it continues from its checkpoint.
"""

from __future__ import annotations

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.config.presets import PRESETS, VAEConfig
from longlive_serve.models.vae.decoder import ResidualBlock, VAEDecoder
from longlive_serve.weights.layouts import VAE_FILE
from training.latents import Encoder, random_segments, random_start
from training.trainer import Trainer, arguments
from training.world import SIZE, draw

LATENTS = 4  # per training clip: the opening and three more
LATENT_NOISE = 0.1  # as the DiT's latents are inexact
CROPPED = 0.75  # share of steps on 8 crops of half the size; the others use 2 full-size clips
MUON_LR = 0.02


class DecoderTrainer(Trainer):
    """Minimises the difference between decoded and drawn frames."""

    def __init__(self, config: VAEConfig, steps: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.encoder = Encoder.fit()
        self.decoder = initialized(VAEDecoder(config))
        named = self.decoder.named_parameters()
        convolutions = [p for name, p in named if p.ndim >= 4 and min(p.shape[:2]) > 1 and ".head." not in name]
        super().__init__(self.decoder, convolutions, MUON_LR, steps, seed, device)

    def rate(self) -> float:
        return max(0.01, 0.5 * (1 + math.cos(math.pi * self.step / self.steps)))

    def losses(self) -> dict[str, Tensor]:
        latents, frames = self.batch()
        decoded = decode(self.decoder, latents)
        return {"loss": F.mse_loss(decoded, frames) + 0.1 * F.l1_loss(decoded, frames)}

    def batch(self) -> tuple[Tensor, Tensor]:
        """Latents [B, LATENTS, 16, h, w] and their frames [B, 4 * LATENTS - 3, 3, 8h, 8w] in -1 to 1."""
        cropped = self.generator.random() < CROPPED
        pairs = []
        for _ in range(8 if cropped else 2):
            frames = draw(random_segments(self.generator, 4 * LATENTS - 3), random_start(self.generator))
            latents = self.encoder(frames)
            if cropped:
                top, left = (self.generator.randrange(SIZE // 16 + 1) for _ in range(2))
                latents = latents[:, :, top : top + SIZE // 16, left : left + SIZE // 16]
                frames = frames[:, :, 8 * top : 8 * top + SIZE // 2, 8 * left : 8 * left + SIZE // 2]
            pairs.append((latents, frames * 2 - 1))
        latents, frames = (torch.stack(parts).to(self.device) for parts in zip(*pairs, strict=True))
        return latents + LATENT_NOISE * torch.randn_like(latents), frames


def initialized(model: VAEDecoder) -> VAEDecoder:
    """Initialise in place: larger convolutions than PyTorch's default, small residual branches."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                module.weight.mul_(3**0.5)
        for module in model.modules():
            if isinstance(module, ResidualBlock):
                module.get_submodule("residual.6").get_parameter("weight").mul_(0.3)
    return model


def decode(model: VAEDecoder, latents: Tensor) -> Tensor:
    """Decode `latents` [B, n, 16, h, w] as starts of videos."""
    batch, _, _, height, width = latents.shape
    cache = model.initial_cache(batch, height, width, latents.device, latents.dtype)
    frames: Tensor = model(latents, cache, True)[0]
    return frames


def main() -> int:
    args = arguments("training.train_decoder", __doc__, steps=1600).parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trainer = DecoderTrainer(PRESETS["demo"].vae, args.steps, args.seed, args.device)
    trainer.train(args.out / "decoder.checkpoint")
    torch.save(trainer.decoder.state_dict(), args.out / VAE_FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
