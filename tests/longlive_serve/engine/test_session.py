# SPDX-License-Identifier: Apache-2.0
"""Prompts to come, and the session's own noise."""

from __future__ import annotations

import pytest
import torch

from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session

pytestmark = pytest.mark.numeric


def new_session(seed: int = 0) -> Session:
    return Session(id="a", prompt=Prompt(index=0, text="first"), noise=SeededNoise(seed))


def test_a_prompt_for_now_replaces_one_that_has_not_taken_effect() -> None:
    session = new_session()
    session.add_prompt("second", NOW)
    session.add_prompt("later", 30)
    assert session.add_prompt("third", NOW).index == 3
    assert [prompt.text for prompt in session.pending] == ["third", "later"]


def test_prompts_to_come_are_ordered_by_their_time() -> None:
    session = new_session()
    for frame in (30, 12, 30, 0):
        session.add_prompt(f"at {frame}", frame)
    assert [prompt.index for prompt in session.pending] == [4, 2, 1, 3]


def test_noise_depends_on_the_seed_alone() -> None:
    a, b, other = SeededNoise(7), SeededNoise(7), SeededNoise(8)
    other.draw((5,), 1)
    torch.randn(3)
    for shape in ((1, 3, 16, 2, 2), (4,)):
        assert torch.equal(a.draw(shape, 2), torch.cat([b.draw(shape, 1) for _ in range(2)]))
    assert not torch.equal(SeededNoise(7).draw((9,), 1), SeededNoise(8).draw((9,), 1))


def test_noise_prepared_ahead_is_the_same_noise_and_so_is_what_a_snapshot_keeps_of_it() -> None:
    plain, ahead = SeededNoise(7), SeededNoise(7)
    first = plain.draw((2, 3), 4)
    state = plain.state
    ahead.prepare((2, 3), 4, pinned=False)
    assert torch.equal(ahead.state, SeededNoise(7).state)
    assert torch.equal(ahead.draw((2, 3), 4), first)
    assert torch.equal(ahead.state, state)
    ahead.prepare((2, 3), 4, pinned=False)
    ahead.prepare((2, 3), 4, pinned=False)  # told twice, drawn once
    assert torch.equal(ahead.state, state)
    resumed = SeededNoise(0)
    resumed.state = ahead.state
    assert torch.equal(resumed.draw((5,), 1), plain.draw((5,), 1))
