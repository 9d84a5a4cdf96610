# SPDX-License-Identifier: Apache-2.0
"""Window and sink arithmetic against a frame-by-frame simulation and the reference's own trace."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_serve.config.presets import PRESETS, WindowConfig
from longlive_serve.models.dit.kv_cache import KVCache, Window
from tests.support.cases import GOLDEN

CHUNK = 3
windows = st.tuples(st.integers(0, 3), st.integers(1, 5)).map(
    lambda sizes: WindowConfig(chunk=CHUNK, sink=CHUNK * sizes[0], window=CHUNK * (sizes[0] + sizes[1]))
)


def kept_in_order_of_time(config: WindowConfig, done: int) -> list[int]:
    """The chunks in the window before chunk `done` enters, moved and evicted one by one as the reference does."""
    sink, capacity = config.sink // CHUNK, config.window // CHUNK
    kept: list[int] = []
    for chunk in range(done):
        if len(kept) == capacity:
            del kept[sink]
        kept.append(chunk)
    return kept


class Recorder:
    """A cache that stores chunk numbers instead of keys."""

    def __init__(self, config: WindowConfig) -> None:
        self.window = Window(config)
        self.blocks: list[int | None] = [None] * self.window.capacity

    def step(self, chunk: int) -> list[int | None]:
        """Place a chunk; returns what it attends to, oldest first."""
        plan = self.window.step(chunk)
        assert plan.chunks == (chunk,)
        self.blocks[plan.first_block] = chunk
        assert plan.query_positions == (plan.key_positions[plan.first_block],)
        in_time: list[int | None] = [None] * plan.num_blocks
        for block, position in enumerate(plan.key_positions):
            in_time[position] = self.blocks[block]
        return in_time


@given(windows, st.integers(1, 60))
def test_a_chunk_attends_to_sink_and_newest_chunks_in_order_of_time(config: WindowConfig, chunks: int) -> None:
    recorder = Recorder(config)
    for chunk in range(chunks):
        assert recorder.step(chunk) == kept_in_order_of_time(config, chunk + 1)


@given(windows, st.integers(1, 60), st.booleans())
def test_a_recache_covers_every_chunk_of_the_window_once(config: WindowConfig, done: int, keep_sink: bool) -> None:
    window = Window(config)
    plan = window.recache(done, keep_sink)
    kept = kept_in_order_of_time(config, done)
    if done <= window.capacity:
        assert list(plan.chunks) == kept
    elif keep_sink:
        assert sorted(plan.chunks) == kept[window.sink :]
        assert plan.first_block == window.sink
    else:
        assert sorted(plan.chunks) == list(range(done - window.capacity, done))
    assert plan.first_block + len(plan.chunks) == plan.num_blocks == len(kept)
    for offset, chunk in enumerate(plan.chunks):
        block = plan.first_block + offset
        assert plan.query_positions[offset] == plan.key_positions[block]
        if block >= window.sink:
            assert window.block_of(chunk) == block
    order = sorted(range(len(plan.chunks)), key=lambda i: plan.query_positions[i])
    assert [plan.chunks[i] for i in order] == sorted(plan.chunks)


@given(windows, st.integers(0, 30), st.integers(0, 30))
def test_a_cleared_cache_fills_as_a_new_one_does(config: WindowConfig, first: int, age: int) -> None:
    window = Window(config)
    assert window.step(first + age, first) == dataclasses.replace(window.step(age), chunks=(first + age,))


def test_a_block_stays_the_same_until_it_is_overwritten() -> None:
    window = Window(WindowConfig())
    assert [window.block_of(chunk) for chunk in range(11)] == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    "name", sorted(json.loads((GOLDEN / "window_trace.json").read_text(encoding="utf-8"))["traces"])
)
def test_the_reference_trace_is_met(name: str) -> None:
    """Who wrote every attended frame, and under which prompt, in every forward of the golden rollouts."""
    calls = json.loads((GOLDEN / "window_trace.json").read_text(encoding="utf-8"))["traces"][name]
    keep_sink = not name.endswith("sinkF")
    window = Window(WindowConfig())
    blocks: list[list[str] | None] = [None] * window.capacity
    for call in calls:
        start, frames = call["current_start_frame"], call["frames"]
        recache = call["kind"].startswith("recache")
        plan = window.recache((start + frames) // CHUNK, keep_sink) if recache else window.step(start // CHUNK)
        for offset, chunk in enumerate(plan.chunks):
            producer = f"{call['kind']}/p{call['prompt']}"
            blocks[plan.first_block + offset] = [f"{CHUNK * chunk + i}:{producer}" for i in range(CHUNK)]
        in_time: list[Any] = [None] * plan.num_blocks
        for block, position in enumerate(plan.key_positions):
            in_time[position] = blocks[block]
        assert [frame for chunk_frames in in_time for frame in chunk_frames] == call["window"], call


def test_windows_that_do_not_fit_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("window 10, sink 3")):
        WindowConfig(window=10)
    with pytest.raises(ValueError, match="sink \\+ chunk = 6"):
        WindowConfig(window=3)


def test_a_slot_is_a_view_of_the_one_allocation() -> None:
    cache = KVCache(PRESETS["tiny"], 3, "cpu")
    keys, values = cache.slot(1)
    tokens = 12 * PRESETS["tiny"].tokens_per_frame
    assert keys.shape == values.shape == (2, 1, 2, tokens, 32)
    keys.fill_(1)
    assert torch.equal(cache.keys.amax((0, 2, 3, 4)), torch.tensor([0.0, 1.0, 0.0]))
