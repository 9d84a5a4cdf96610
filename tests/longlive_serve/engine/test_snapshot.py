# SPDX-License-Identifier: Apache-2.0
"""Snapshots: a session goes on from its bytes, and nothing else is taken for one."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_serve.config.presets import PRESETS
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.engine.snapshot import SUM_BYTES, dump, load_session
from longlive_serve.protocol.errors import RequestError
from training.quality.__main__ import SHIPPED
from training.quality.workers import build_model_runner

pytestmark = pytest.mark.numeric

DEMO = PRESETS["demo"]
RED = "A red circle drifts right over a plain black background."
BLUE = "A single blue square slowly glides left across a plain black background."


@functools.cache
def runner() -> ModelRunner:
    return build_model_runner(SHIPPED)


def played(chunks: int, switch_at: int | None = None) -> Session:
    session = Session(id="s", prompt=Prompt(index=0, text=RED), noise=SeededNoise(7), slot=0)
    for chunk in range(chunks):
        if chunk == switch_at:
            session.add_prompt(BLUE, NOW)
        runner().advance(session)
    return session


def load_again(data: bytes) -> Session:
    session = load_session(data, "t", "", DEMO, "cpu", torch.float32)
    session.slot = 1
    return session


@functools.cache
def snapshot() -> bytes:
    return dump(played(6, switch_at=5), DEMO)


@pytest.mark.parametrize(("chunks", "switch_at"), [(1, None), (3, None), (4, 2), (9, None), (9, 6), (9, 3)])
def test_a_session_goes_on_from_its_snapshot(chunks: int, switch_at: int | None) -> None:
    session = played(chunks, switch_at)
    session.add_prompt("A green triangle moves up across an empty white scene.", 3 * (chunks + 2))
    resumed = load_again(dump(session, DEMO))
    assert (resumed.next_chunk, resumed.prompt, resumed.prompts, resumed.pending) == (
        session.next_chunk,
        session.prompt,
        session.prompts,
        session.pending,
    )
    runner().backends.dit.cache.keys[:, 1] = torch.nan  # type: ignore[attr-defined]  # nothing of before is needed
    for _ in range(4):
        expected, got = runner().advance(session), runner().advance(resumed)
        assert (got.first_frame, got.prompt_index) == (expected.first_frame, expected.prompt_index)
        difference = np.abs(got.frames.astype(int) - expected.frames.astype(int)).mean()
        assert difference < 4, "of 255: the same picture, but for the history that has left the window"


def test_the_sink_keeps_the_prompt_that_wrote_it() -> None:
    late, early = played(8, switch_at=6), played(8, switch_at=3)
    assert [(one.chunk, one.prompt.text) for one in late.sink] == [(0, RED)]
    assert [(one.chunk, one.prompt.text) for one in early.sink] == [(0, BLUE)]
    renewed = Session(id="s", prompt=Prompt(index=0, text=RED), noise=SeededNoise(7), slot=0, global_sink=False)
    for chunk in range(7):
        if chunk == 6:
            renewed.add_prompt(BLUE, NOW)
        runner().advance(renewed)
    assert [(one.chunk, one.prompt.text) for one in renewed.sink] == [(2, BLUE)]
    again = load_again(dump(renewed, DEMO))
    assert [(one.chunk, one.prompt) for one in again.sink] == [(one.chunk, one.prompt) for one in renewed.sink]


def test_a_cleared_cache_stays_cleared() -> None:
    session = played(6)
    session.on_switch = "clear"
    session.add_prompt(BLUE, NOW)
    runner().advance(session)
    resumed = load_again(dump(session, DEMO))
    assert (resumed.first_cached, resumed.next_chunk) == (6, 7)
    runner().backends.dit.cache.keys[:, 1] = torch.nan  # type: ignore[attr-defined]
    frames = [runner().advance(one).frames.astype(int) for one in (session, resumed)]
    assert np.abs(frames[0] - frames[1]).mean() < 4


def test_a_snapshot_is_small() -> None:
    assert len(snapshot()) < 100_000


@given(st.integers(0, 10**9), st.integers(1, 255))
def test_a_damaged_snapshot_is_refused(place: int, flip: int) -> None:
    data = bytearray(snapshot())
    data[place % len(data)] ^= flip
    with pytest.raises(RequestError, match="checksum is wrong") as raised:
        load_again(bytes(data))
    assert raised.value.kind == RequestError.INVALID_REQUEST


@given(st.binary(max_size=300))
def test_what_is_no_snapshot_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="SNAPSHOT: it cannot be read"):
        load_again(hashlib.sha256(body).digest() + body)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'\\"next_chunk\\": 6', b'\\"next_chunk\\": 2', "does not describe a session"),
        (b'\\"next_chunk\\": 6', b'\\"next_chunk\\": x', "cannot be read"),
        (b'\\"version\\": 3', b'\\"version\\": 9', "got version 9"),
        (b'\\"model\\": \\"demo\\"', b'\\"model\\": \\"tiny\\"', "expected version 3 and 'demo'"),
        (b'\\"on_switch\\": \\"recache\\"', b'\\"on_switch\\": \\"explode\\"', "does not describe a session"),
        (b'\\"first_cached\\": 0', b'\\"first_cached\\": 9', "does not describe a session"),
        (b'\\"prompts\\"', b'\\"prompty\\"', "does not describe a session"),
    ],
)
def test_a_forged_snapshot_is_refused(old: bytes, new: bytes, message: str) -> None:
    body = snapshot()[SUM_BYTES:]
    assert body.count(old) >= 1
    assert len(old) == len(new)
    forged = body.replace(old, new)
    with pytest.raises(RequestError, match=message):
        load_again(hashlib.sha256(forged).digest() + forged)


def test_a_snapshot_that_would_leave_a_block_unwritten_is_refused() -> None:
    session = played(9)
    session.sink.clear()  # its block would still hold another session's keys
    with pytest.raises(RequestError, match="got 0 chunks of the sink"):
        load_again(dump(session, DEMO))
    session = played(9)
    session.context_latents.popleft()
    with pytest.raises(RequestError, match="got 3 recent chunks before chunk 9"):
        load_again(dump(session, DEMO))


def test_a_snapshot_may_not_carry_what_a_request_may_not() -> None:
    session = played(1)
    session.pending = [Prompt(index=n, text=RED, at_latent_frame=300) for n in range(65)]
    with pytest.raises(RequestError, match="65 pending prompts"):
        load_again(dump(session, DEMO))
    session.pending = [Prompt(index=1, text="fox " * 20_000, at_latent_frame=300)]
    with pytest.raises(RequestError, match="got a prompt of 80000 characters"):
        load_again(dump(session, DEMO))
