# SPDX-License-Identifier: Apache-2.0
"""The DiT's training clips: latents of drawn videos, and the attributes at their ends.

Used by `train_dit`. Half of the clips switch their attributes at a chunk boundary.
"""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from longlive_serve.config.presets import WindowConfig
from training.latents import Encoder, random_attributes
from training.world import Attributes, Segment, draw

CHUNK = WindowConfig().chunk
CHUNKS = 6  # per clip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A clip that starts at the centre of the picture, as every demo video does."""

    latents: Tensor  # [CHUNK * CHUNKS, 16, h, w]
    attributes: Attributes
    """After the switch, if there is one."""
    switch: int
    """The first chunk under `attributes`; 0 in a clip without a switch."""


def make_clip(encoder: Encoder, generator: random.Random) -> Clip:
    attributes, switch = random_attributes(generator), 0
    segments = []
    if generator.random() < 0.5:
        switch = generator.randrange(1, CHUNKS)
        before = random_attributes(generator)
        while before == attributes:
            before = random_attributes(generator)
        segments.append(Segment(attributes=before, frames=video_frames(switch)))
    segments.append(Segment(attributes=attributes, frames=video_frames(CHUNKS) - video_frames(switch)))
    latents = encoder(draw(segments))
    assert (switch > 0) == (len({segment.attributes for segment in segments}) == 2), "a switch clip must switch"
    return Clip(latents=latents, attributes=attributes, switch=switch)


def video_frames(chunks: int) -> int:
    """Frames of a video's first `chunks` chunks."""
    return 1 + 4 * (CHUNK * chunks - 1) if chunks else 0


def make_pool(encoder: Encoder, clips: int, seed: int) -> list[Clip]:
    generator = random.Random(seed)
    with torch.inference_mode():
        return [make_clip(encoder, generator) for _ in range(clips)]
