# SPDX-License-Identifier: Apache-2.0
"""Frames -> latents by a fixed linear map, which replaces a VAE encoder for the demo model.

Used by training only: serving needs no encoder. A latent pixel is 16 whitened principal components of a block of
4 frames x 8 x 8 pixels; the first latent frame repeats the first video frame four times. A latent frame depends only on
its own frames, so clips can be cut and joined exactly at latent boundaries.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from training.world import ALL, SIZE, Attributes, Segment, draw, held_out

CHANNELS = 16
BLOCK = 8
FRAMES = 4
CONTENT_WEIGHT = 10.0  # of blocks with more than the plain background


def blocks(frames: Tensor) -> Tensor:
    """[1 + 4n, 3, SIZE, SIZE] in 0 to 1 -> [1 + n, rows, columns, 768] in -1 to 1."""
    padded = torch.cat([frames[:1].expand(FRAMES - 1, -1, -1, -1), frames]) * 2 - 1
    patches: Tensor = padded.unflatten(0, (-1, FRAMES)).unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))
    return patches.permute(0, 3, 5, 1, 2, 4, 6).flatten(3)  # [latents, rows, columns, (frame, colour, y, x)]


class Encoder:
    """The linear map; `fit` computes it."""

    def __init__(self, mean: Tensor, matrix: Tensor) -> None:
        self.mean, self.matrix = mean, matrix  # [768], [768, CHANNELS]
        self.inverse = torch.linalg.pinv(matrix)

    @classmethod
    def fit(cls, clips: int = 400, seed: int = 0) -> Encoder:
        """Whitened principal components of random clips; blocks with content have CONTENT_WEIGHT."""
        generator = random.Random(seed)
        count, total, second = 0.0, torch.zeros(768, dtype=torch.float64), torch.zeros(768, 768, dtype=torch.float64)
        for _ in range(clips):
            patches = blocks(draw(random_segments(generator, 17), random_start(generator))).flatten(0, 2).double()
            weight = 1 + (CONTENT_WEIGHT - 1) * (patches.unflatten(1, (FRAMES, 3, -1)).std(-1).amax((1, 2)) > 0.05)
            count += weight.sum().item()
            total += (weight[:, None] * patches).sum(0)
            second += patches.T @ (weight[:, None] * patches)
        mean = total / count
        values, vectors = torch.linalg.eigh(second / count - mean[:, None] * mean)
        values, vectors = values[-CHANNELS:].flip(0), vectors[:, -CHANNELS:].flip(1)
        return cls(mean.float(), (vectors / values.sqrt()).float())

    def __call__(self, frames: Tensor) -> Tensor:
        """[1 + 4n, 3, SIZE, SIZE] in 0 to 1 -> latents [1 + n, CHANNELS, SIZE / 8, SIZE / 8]."""
        return ((blocks(frames) - self.mean) @ self.matrix).permute(0, 3, 1, 2)

    def decode(self, latents: Tensor) -> Tensor:
        """The pseudo-inverse: latents [.., CHANNELS, h, w] -> blurred frames [.., FRAMES, 3, SIZE, SIZE]."""
        patches = latents.movedim(-3, -1) @ self.inverse + self.mean
        patches = patches.unflatten(-1, (FRAMES, 3, BLOCK, BLOCK))  # [.., rows, columns, frame, colour, y, x]
        pictures: Tensor = patches.movedim((-6, -5), (-4, -2)).flatten(-4, -3).flatten(-2)
        return pictures / 2 + 0.5


def random_start(generator: random.Random) -> tuple[float, float]:
    return generator.uniform(0, SIZE), generator.uniform(0, SIZE)


def random_attributes(generator: random.Random) -> Attributes:
    """Any combination that is not held out."""
    while (attributes := generator.choice(ALL)) in HELD_OUT:
        pass
    return attributes


def random_segments(generator: random.Random, frames: int) -> list[Segment]:
    """The segments of a clip; half of the clips change their attributes at a latent boundary."""
    attributes, after = random_attributes(generator), random_attributes(generator)
    if generator.random() < 0.5:
        return [Segment(attributes=attributes, frames=frames)]
    first = 1 + FRAMES * generator.randrange((frames - 1) // FRAMES)
    return [Segment(attributes=attributes, frames=first), Segment(attributes=after, frames=frames - first)]


HELD_OUT = held_out()
