# SPDX-License-Identifier: Apache-2.0
"""The demo world and the reader of its frames."""

from __future__ import annotations

import random

import pytest
import torch

from training.quality.reader import read
from training.world import ALL, SIZE, Attributes, Segment, caption, draw, held_out, paths, vocabulary


def as_video(frames: torch.Tensor) -> torch.Tensor:
    return (frames * 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.mark.parametrize("attributes", random.Random(1).sample(ALL, 60), ids=str)
def test_a_true_clip_reads_as_what_it_is(attributes: Attributes) -> None:
    start = tuple(torch.rand(2, generator=torch.Generator().manual_seed(len(str(attributes)))) * SIZE)
    reading = read(as_video(draw([Segment(attributes=attributes, frames=24)], start)))
    assert all(reading.agrees(attributes).values()), reading
    assert reading.overlap > 0.85


def test_a_clip_that_switches_reads_differently_before_and_after() -> None:
    before, after = ALL[0], ALL[-1]
    assert all(a != b for a, b in zip(vars(before).values(), vars(after).values(), strict=True))
    video = as_video(draw([Segment(attributes=before, frames=21), Segment(attributes=after, frames=24)]))
    assert all(read(video[:21]).agrees(before).values())
    assert all(read(video[21:]).agrees(after).values())
    assert not any(read(video[21:]).agrees(before).values())


def test_the_position_carries_on_at_a_switch_and_wraps() -> None:
    right = Attributes(shape="circle", colour="red", motion="right", background="black")
    up = Attributes(shape="circle", colour="red", motion="up", background="black")
    centres = paths([Segment(attributes=right, frames=40), Segment(attributes=up, frames=2)])
    assert centres[0].tolist() == [32, 32]
    assert centres[39].tolist() == [7, 32]
    assert centres[41].tolist() == [7, 30]


def test_noise_and_empty_frames_are_not_read_as_a_shape() -> None:
    assert read(torch.full((24, SIZE, SIZE, 3), 115, dtype=torch.uint8)).shape is None
    noise = torch.randint(0, 256, (24, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert read(noise).overlap < 0.5


def test_captions_say_all_attributes_in_known_words() -> None:
    known, generator = set(vocabulary()), random.Random(0)
    texts = set()
    for attributes in ALL * 5:
        text = caption(attributes, generator)
        texts.add(text)
        words = set(text.lower().replace(".", "").split())
        assert words <= known
        assert {attributes.shape, attributes.colour, attributes.background, attributes.motion} <= words | {"still"}
        assert ("still" in words or "not" in words or "without" in words) == (attributes.motion == "still")
    assert len(texts) > 1000


def test_held_out_combinations_leave_every_attribute_in_training() -> None:
    kept = set(ALL) - held_out()
    assert len(ALL) == 360
    assert len(held_out()) == 36
    for name in ("shape", "colour", "motion", "background"):
        assert {getattr(a, name) for a in kept} == {getattr(a, name) for a in ALL}
