# SPDX-License-Identifier: Apache-2.0
"""Reads shape, colour, motion and background off the frames of a demo video.

Used by the quality measure. It knows how `world.py` draws, but not the models.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZE, SPEED, Attributes, coverage

MASK_DISTANCE = 0.25  # minimum RGB distance from the background of the shape's pixels
CORE = 0.7  # share of the largest distance, for pixels with the shape's colour
SMALLEST = 20  # pixels of a shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The attributes of some frames. None: not readable."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str
    overlap: float
    """Intersection over union with the ideal shape, mean over frames."""

    def agrees(self, attributes: Attributes) -> dict[str, bool]:
        """Per attribute, whether it is as expected."""
        requested = dataclasses.asdict(attributes)
        return {name: getattr(self, name) == value for name, value in requested.items()}


def read(frames: Tensor) -> Reading:
    """Read uint8 [frames, SIZE, SIZE, 3]; two chunks suffice. The shape is a majority vote of the frames."""
    video = frames.float().div(255).permute(0, 3, 1, 2)
    ground = video.flatten(2).median(-1).values  # [frames, 3]
    background = _nearest(ground.median(0).values, BACKGROUNDS)
    distance = (video - ground[:, :, None, None]).norm(dim=1)
    masks = distance > MASK_DISTANCE
    seen = masks.sum((1, 2)) >= SMALLEST
    if seen.sum() * 2 < len(frames):
        return Reading(shape=None, colour=None, motion=None, background=background, overlap=0.0)
    video, distance, masks = video[seen], distance[seen], masks[seen]
    centres = torch.stack([_centre(mask) for mask in masks])
    shapes, overlaps = zip(*(_shape(mask, centre) for mask, centre in zip(masks, centres, strict=True)), strict=True)
    core = distance > CORE * distance.amax((1, 2), keepdim=True)
    colour = video.permute(0, 2, 3, 1)[core & masks].median(0).values
    return Reading(
        shape=max(SHAPES, key=shapes.count),
        colour=_nearest(colour, COLOURS),
        motion=_motion(centres, seen),
        background=background,
        overlap=sum(overlaps) / len(overlaps),
    )


def _nearest(colour: Tensor, palette: dict[str, tuple[float, float, float]]) -> str:
    return min(palette, key=lambda name: (colour - torch.tensor(palette[name])).square().sum().item())


def _centre(mask: Tensor) -> Tensor:
    """Centre of mass (x, y) on the torus: the circular mean of the coordinates."""
    turn = 2 * math.pi / SIZE
    angles = (torch.arange(SIZE) + 0.5) * turn
    centre = []
    for weights in (mask.sum(0).float(), mask.sum(1).float()):
        angle = torch.atan2((weights * angles.sin()).sum(), (weights * angles.cos()).sum())
        centre.append((angle / turn) % SIZE)
    return torch.stack(centre)


def _shape(mask: Tensor, centre: Tensor) -> tuple[str, float]:
    """The shape with the largest IoU, and the IoU; shifted by up to two pixels from the mask's centre."""
    shifts = torch.cartesian_prod(torch.arange(-2.0, 2.5), torch.arange(-2.0, 2.5))
    best = ("", -1.0)
    for shape in SHAPES:
        ideal = coverage(shape, (centre + shifts) % SIZE) > 0.5
        overlap = ((ideal & mask).sum((1, 2)) / (ideal | mask).sum((1, 2))).max().item()
        best = max(best, (shape, overlap), key=lambda pair: pair[1])
    return best


def _motion(centres: Tensor, seen: Tensor) -> str:
    """The motion nearest to the mean step between consecutive frames, on the torus."""
    indices = seen.nonzero().flatten()
    follows = indices.diff() == 1
    steps = ((centres.diff(dim=0) + SIZE / 2) % SIZE - SIZE / 2)[follows]
    step = steps.mean(0)
    return min(MOTIONS, key=lambda name: (step - SPEED * torch.tensor(MOTIONS[name])).norm().item())
