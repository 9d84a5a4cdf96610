# SPDX-License-Identifier: Apache-2.0
"""The demo model's synthetic world: a coloured shape that moves over a plain background, with a caption.

Used by training and by the quality measure. The plane is a torus: a shape that leaves on one side enters on the other,
so motion never ends. Drawing runs on any device.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Sequence

import torch
from torch import Tensor

SIZE = 64  # pixels, both ways
RADIUS = 10.0
SPEED = 1.0  # pixels per frame

COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.25, 0.90),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.75),
    "orange": (0.98, 0.50, 0.08),
}
BACKGROUNDS = {"black": (0.02, 0.02, 0.02), "white": (0.98, 0.98, 0.98), "gray": (0.45, 0.45, 0.45)}
MOTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # x to the right, y down
SHAPES = ("circle", "square", "triangle", "cross")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attributes:
    """The content of a caption, which can be read off the frames."""

    shape: str
    colour: str
    motion: str
    background: str


ALL = tuple(
    Attributes(shape=shape, colour=colour, motion=motion, background=background)
    for shape, colour, motion, background in itertools.product(SHAPES, COLOURS, MOTIONS, BACKGROUNDS)
)


def held_out() -> frozenset[Attributes]:
    """A tenth of all combinations, which training never uses; it uses every single attribute."""
    return frozenset(random.Random(360).sample(ALL, len(ALL) // 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """Consecutive frames with the same attributes."""

    attributes: Attributes
    frames: int


def paths(segments: Sequence[Segment], start: tuple[float, float] = (SIZE / 2, SIZE / 2)) -> Tensor:
    """Centres [frames, 2] (x, y) of the shape; the position is continuous across segments."""
    steps = [torch.tensor(MOTIONS[segment.attributes.motion]).expand(segment.frames, 2) for segment in segments]
    moved = torch.cat(steps).float() * SPEED
    moved[0] = 0.0
    return (torch.tensor(start) + moved.cumsum(0)) % SIZE


def draw(
    segments: Sequence[Segment],
    start: tuple[float, float] = (SIZE / 2, SIZE / 2),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the segments: float32 [frames, 3, SIZE, SIZE], 0 to 1."""
    centres = paths(segments, start).to(device)
    pictures, first = [], 0
    for segment in segments:
        look = segment.attributes
        inside = coverage(look.shape, centres[first : first + segment.frames])[:, None]
        colour, ground = (
            torch.tensor(table[name], device=device)[:, None, None]
            for table, name in ((COLOURS, look.colour), (BACKGROUNDS, look.background))
        )
        pictures.append(inside * colour + (1 - inside) * ground)
        first += segment.frames
    return torch.cat(pictures)


def coverage(shape: str, centres: Tensor) -> Tensor:
    """Coverage of each pixel by the shape: [frames, SIZE, SIZE], 0 to 1, with an edge one pixel wide."""
    pixel = torch.arange(SIZE, device=centres.device) + 0.5
    dx, dy = ((pixel - centre[:, None] + SIZE / 2) % SIZE - SIZE / 2 for centre in centres.unbind(1))
    return (0.5 - _distance(shape, dx[:, None, :], dy[:, :, None])).clamp(0, 1)


def _distance(shape: str, dx: Tensor, dy: Tensor) -> Tensor:
    """Signed distance in pixels from the edge of the shape, negative inside; exact only near the edge."""
    if shape == "circle":
        return (dx.square() + dy.square()).sqrt() - RADIUS
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.89 * RADIUS
    if shape == "triangle":  # point up
        return torch.maximum(dy - 0.75 * RADIUS, 0.894 * dx.abs() - 0.447 * (dy + 1.25 * RADIUS))
    bar, arm = 0.36 * RADIUS, 1.05 * RADIUS
    across = torch.maximum(dx.abs() - arm, dy.abs() - bar)
    along = torch.maximum(dx.abs() - bar, dy.abs() - arm)
    return torch.minimum(across, along)


MOVES = {
    "still": ("stays still on", "rests without moving on", "does not move on"),
    **{way: (f"moves {way} across", f"drifts {way} over", f"glides {way} across") for way in MOTIONS if way != "still"},
}
OPENINGS = ("A {look}", "There is one {look} here. It", "In this scene a {look}", "A single {look} slowly")
BACKDROPS = ("a plain {background} background.", "a {background} background.", "an empty {background} scene.")


def caption(attributes: Attributes, generator: random.Random) -> str:
    """A random wording of the attributes."""
    opening = generator.choice(OPENINGS).format(look=f"{attributes.colour} {attributes.shape}")
    move = generator.choice(MOVES[attributes.motion])
    return f"{opening} {move} {generator.choice(BACKDROPS).format(background=attributes.background)}"


def vocabulary() -> list[str]:
    """All words of captions, in lower case and alphabetical order."""
    words = {word for text in (*OPENINGS, *BACKDROPS, *itertools.chain(*MOVES.values())) for word in text.split()}
    words = {word.strip(".").lower() for word in words if "{" not in word}
    return sorted(words | {*SHAPES, *COLOURS, *BACKGROUNDS})
