# SPDX-License-Identifier: Apache-2.0
"""The model runner on the tiny preset: frames, prompts, limits, and that sessions do not touch each other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from longlive_serve.backends.base import EncodedPrompt
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner, prompt_notice
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk

pytestmark = pytest.mark.numeric


@functools.cache
def runner(variant: str = "base") -> ModelRunner:
    config = ServeConfig(preset="tiny", variant=variant, device="cpu", slots=2)
    return ModelRunner(build_backends(config), config.model_config, variant)


def new_session(slot: int = 0, seed: int = 0, text: str = "a fox") -> Session:
    return Session(id=f"s{slot}", prompt=Prompt(index=0, text=text), noise=SeededNoise(seed), slot=slot)


def run(
    chunks: int, change: Callable[[Session, int], None] = lambda session, chunk: None, **how: Any
) -> list[FrameChunk]:
    session = new_session(**how)
    made = []
    for chunk in range(chunks):
        change(session, chunk)
        made.append(runner().advance(session))
    return made


def frames_of(chunks: list[FrameChunk]) -> np.ndarray[Any, Any]:
    return np.concatenate([chunk.frames for chunk in chunks])


def test_the_first_chunk_has_nine_frames_and_the_others_twelve() -> None:
    chunks = run(4)
    assert [chunk.frames.shape for chunk in chunks] == [(9, 32, 48, 3)] + [(12, 32, 48, 3)] * 3
    assert [chunk.first_frame for chunk in chunks] == [0, 9, 21, 33]
    assert frames_of(chunks).dtype == np.uint8
    assert frames_of(chunks).std() > 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_frames_do_not_wait_for_the_commit(asynchronous: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given to the device behind them; where the host waits for it, the frames have been handed on before."""
    config = ServeConfig(preset="tiny", device="cpu", slots=1)
    its_own, calls = ModelRunner(build_backends(config), config.model_config), list[str]()
    its_own.asynchronous = asynchronous
    for model, name in ((its_own.backends.dit, "update_kv_cache"), (its_own.backends.vae_decoder, "decode")):
        plain = getattr(model, name)

        def noted(*given: Any, name: str = name, plain: Callable[..., Any] = plain) -> Any:
            calls.append(name)
            return plain(*given)

        monkeypatch.setattr(model, name, noted)
    session = new_session()
    for chunk in range(3):
        launched = its_own.execute_model_async(session, partial_chunks=True)
        assert len(session.sink) == 1, "what a snapshot is made of is there"
        for part in its_own.collect_output(launched):
            calls.append(f"{len(part.frames)} frames")
        names = [phase.name for phase in its_own.phases]
        assert names == ["kv_cache_update"] * (chunk > 0) + ["switch", "denoise"] + ["decode"] * 3
        parts = ["4 frames" if chunk else "1 frames", "4 frames", "4 frames"]
        at_once, one_by_one = (
            ["decode"] * 3 + ["update_kv_cache", *parts],
            [word for part in parts for word in ("decode", part)],
        )
        assert calls == (at_once if asynchronous else [*one_by_one, "update_kv_cache"])
        calls.clear()


def test_a_seed_gives_the_same_video_again() -> None:
    assert np.array_equal(frames_of(run(3, seed=5)), frames_of(run(3, seed=5, slot=1)))
    assert not np.array_equal(frames_of(run(3, seed=5)), frames_of(run(3, seed=6)))


def test_interleaved_sessions_make_the_frames_that_each_makes_alone() -> None:
    def switch(session: Session, chunk: int) -> None:
        if chunk == 5 and session.slot == 1:
            session.add_prompt("a bird", NOW)

    alone = [frames_of(run(8, switch, slot=slot, seed=slot)) for slot in (0, 1)]
    sessions = [new_session(slot, seed=slot) for slot in (0, 1)]
    made: list[list[FrameChunk]] = [[], []]
    for chunk in range(8):
        for session in sessions:
            switch(session, chunk)
            made[session.slot].append(runner().advance(session))
    for slot in (0, 1):
        assert np.array_equal(frames_of(made[slot]), alone[slot])


def test_a_prompt_takes_effect_at_the_next_chunk() -> None:
    def switch(session: Session, chunk: int) -> None:
        if chunk == 2:
            session.add_prompt("a bird", NOW)

    plain, switched = run(5), run(5, switch)
    assert [chunk.prompt_index for chunk in switched] == [0, 0, 1, 1, 1]
    assert np.array_equal(frames_of(plain[:2]), frames_of(switched[:2]))
    assert not np.array_equal(plain[2].frames, switched[2].frames)


@pytest.mark.parametrize("on_switch", ["keep", "clear"])
def test_the_other_ways_to_switch_change_what_follows(on_switch: str) -> None:
    def switch(session: Session, chunk: int) -> None:
        if chunk == 5:
            session.add_prompt("a bird", NOW)

    def other_way(session: Session, chunk: int) -> None:
        session.on_switch = on_switch
        switch(session, chunk)

    recached, other = run(9, switch), run(9, other_way)
    assert np.array_equal(frames_of(recached[:5]), frames_of(other[:5]))
    assert not np.array_equal(recached[5].frames, other[5].frames)
    assert [chunk.prompt_index for chunk in other] == [0] * 5 + [1] * 4


def test_a_cleared_cache_shows_nothing_of_the_past() -> None:
    """Two videos with one noise from the switch on, and different pasts, have the same latents after a clear."""

    def latents_after(text: str) -> list[torch.Tensor]:
        session = new_session(text=text)
        session.on_switch = "clear"
        for chunk in range(8):
            if chunk == 5:
                session.add_prompt("a bird", NOW)
                session.noise = SeededNoise(11)
            runner().advance(session)
        return list(session.context_latents)[-3:]

    for one, other in zip(latents_after("a fox"), latents_after("a whale at night"), strict=True):
        assert torch.equal(one, other)


def test_prompts_for_the_same_chunk_take_effect_one_chunk_after_the_other() -> None:
    def switch(session: Session, chunk: int) -> None:
        if chunk == 0:
            for index, frame in enumerate((7, 8, 14)):
                session.add_prompt(f"scene {index}", frame)

    assert [chunk.prompt_index for chunk in run(7, switch)] == [0, 0, 0, 1, 2, 3, 3]


def test_a_truncated_prompt_is_announced_once() -> None:
    session = new_session(text="fox " * 40)
    first, second = runner().advance(session), runner().advance(session)
    assert first.notice == "prompt 0 was truncated: it has 160 tokens, the first 64 are used"
    assert second.notice == ""


def test_unknown_words_are_announced_with_the_known_ones() -> None:
    def notice(**words: tuple[str, ...]) -> str:
        return prompt_notice(2, EncodedPrompt(embeds=torch.zeros(1), tokens=4, tokens_given=4, **words))

    assert notice() == ""
    assert notice(unknown=("dragon", "castle"), known=("cross", "red")) == (
        "prompt 2 has words that this model does not know: dragon, castle; it knows: cross, red"
    )
    assert notice(unknown=("qzx",)) == "prompt 2 has words that this model does not know: qzx"


def test_the_base_variant_ends_at_its_documented_limit() -> None:
    session = new_session()
    runner().advance(session)
    session.next_chunk = 340  # as if it had run for 255 seconds
    last = runner().advance(session)
    assert last.first_frame + len(last.frames) == 4089
    with pytest.raises(RequestError, match="1023 latent frames \\(4089 video frames\\)") as raised:
        runner().advance(session)
    assert raised.value.kind == RequestError.FRAME_LIMIT
