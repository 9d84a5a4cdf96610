# SPDX-License-Identifier: Apache-2.0
"""Training in the model's own videos: it is the server's model runner that is trained, towards what should come
next."""

from __future__ import annotations

import copy
import dataclasses
import random

import pytest
import torch
from torch import Tensor

from longlive_serve.backends.base import PromptKV
from longlive_serve.backends.torch_backend import TorchDiT, TorchTextEncoder, TorchVAEDecoder
from longlive_serve.config.presets import PRESETS, VAE_DECODER
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, Session
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.weights.loader import load_model
from tests.support.tolerance import Float64, error
from training.latents import Encoder
from training.quality.__main__ import SHIPPED
from training.quality.workers import build_model_runner
from training.rollouts import MIDDLE, Rollout, locate_shape
from training.train_dit import DEMO
from training.world import ALL, MOTIONS, Segment, draw, paths

pytestmark = pytest.mark.numeric

PROMPTS = {0: "a red circle", 2: "a blue square", 6: "a green cross"}


class GlobalNoise:
    """Noise in the order in which a session draws it, from torch's own generator."""

    def draw(self, shape: tuple[int, ...], draws: int) -> Tensor:
        return torch.stack([torch.randn(shape) for _ in range(draws)])

    def prepare(self, shape: tuple[int, ...], draws: int, pinned: bool) -> None:
        pass


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(clips=40)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return build_model_runner(SHIPPED)


def in_float64(runner: ModelRunner) -> ModelRunner:
    """The same with another DiT, for `Float64`."""
    assert isinstance(runner.backends.dit, TorchDiT)
    dit = TorchDiT(copy.deepcopy(runner.backends.dit.model).double(), DEMO, 1, "base")
    few = load_model(VAE_DECODER, PRESETS["tiny"], "random", "cpu", torch.float32)  # nobody looks at the frames
    backends = dataclasses.replace(runner.backends, dit=dit, vae_decoder=TorchVAEDecoder(few, DEMO), dtype="float64")
    return ModelRunner(backends, DEMO, "base")


def rollout_of(runner: ModelRunner, encoder: Encoder) -> Rollout:
    assert isinstance(runner.backends.dit, TorchDiT)
    return Rollout(runner.backends.dit.model, Window(DEMO.window), runner.backends.dit.tables, encoder)


def embedded(runner: ModelRunner, text: str) -> PromptKV:
    assert isinstance(runner.backends.text_encoder, TorchTextEncoder)
    encoded = runner.backends.text_encoder.encode(text)
    return runner.backends.dit.embed_prompt(encoded.embeds, encoded.tokens)


@pytest.mark.parametrize("keep_sink", [True, False])
def test_a_rollout_generates_what_the_pipeline_does(runner: ModelRunner, encoder: Encoder, keep_sink: bool) -> None:
    """In float64, where another order of sums makes no difference."""
    runner = in_float64(runner)
    session = Session(
        id="s", prompt=Prompt(index=0, text=PROMPTS[0]), noise=GlobalNoise(), slot=0, global_sink=keep_sink
    )
    served = []
    torch.manual_seed(3)
    with Float64():
        for chunk in range(9):
            if chunk and chunk in PROMPTS:
                session.add_prompt(PROMPTS[chunk], NOW)
            runner.advance(session)
            served.append(session.context_latents[-1])

    rollout = rollout_of(runner, encoder)
    rollout.begin(ALL[:1])
    torch.manual_seed(3)
    with torch.no_grad(), Float64():
        for chunk in range(9):
            if chunk in PROMPTS:
                prompt_kv = embedded(runner, PROMPTS[chunk])
            rollout.advance(ALL[:1], prompt_kv, switch=chunk > 0 and chunk in PROMPTS, keep_sink=keep_sink)
            assert served[chunk].dtype == rollout.context_latents[-1].dtype == torch.float64
            assert error(rollout.context_latents[-1], served[chunk]) < 1e-9, chunk


def test_a_session_may_join_late(runner: ModelRunner, encoder: Encoder) -> None:
    rollout = rollout_of(runner, encoder)
    looks = [ALL[10], ALL[200]]
    prompt_kv = embedded(runner, PROMPTS[0])
    for chunk in (1, 3, 4, 5, 100):
        rollout.join(looks, prompt_kv, chunk, random.Random(chunk))
        assert len(rollout.context_latents) == min(chunk, 4)
        loss = rollout.advance(looks, prompt_kv, switch=True, keep_sink=True)
        assert loss.isfinite()
        assert rollout.chunk == chunk + 1


def test_the_loss_teaches_the_recache(runner: ModelRunner, encoder: Encoder) -> None:
    rollout = rollout_of(runner, encoder)
    prompt_kv = embedded(runner, PROMPTS[0])
    rollout.join(ALL[:1], prompt_kv, 7, random.Random(0))
    loss = rollout.advance(ALL[:1], prompt_kv, switch=True, keep_sink=True)
    assert loss.requires_grad
    rows = rollout.cache.keys[0]
    assert [row.requires_grad for row in rows] == [False, True, True, True]  # the sink, and the recached chunks
    rollout.cache.detach()
    assert not any(row.requires_grad for row in rows)


@pytest.mark.parametrize("number", range(0, len(ALL), 13))
def test_a_shape_is_found_where_it_was_drawn(encoder: Encoder, number: int) -> None:
    generator = random.Random(number)
    segment = Segment(attributes=ALL[number], frames=13)
    start = (generator.randrange(64), generator.randrange(64))
    frames = draw([segment], start)
    blurred = encoder.decode(encoder(frames)[-1])
    assert blurred.shape == (4, 3, 64, 64)
    found, drawn = locate_shape(blurred, ALL[number]), paths([segment], start)[-1].tolist()
    assert all(abs((f - d + 32) % 64 - 32) <= 1 for f, d in zip(found, drawn, strict=True)), (found, drawn)


def test_the_target_goes_on_from_the_models_own_frames(runner: ModelRunner, encoder: Encoder) -> None:
    rollout = rollout_of(runner, encoder)
    before, after = ALL[0], ALL[-1]
    assert (before.motion, after.motion) == ("right", "still")
    rollout.begin([before])
    is_first = rollout.targets([before])
    assert torch.equal(is_first[0], encoder(draw([Segment(attributes=before, frames=9)])))
    shown = encoder(draw([Segment(attributes=before, frames=9)], (7, 40)))  # not where it should be
    rollout.context_latents.append(shown[None])
    rollout.chunk = 1
    end = (7 + 8 * MOTIONS["right"][0], 40)
    segments = [Segment(attributes=after, frames=13)]
    assert torch.equal(rollout.targets([after])[0], encoder(draw(segments, end))[1:])
    assert end != MIDDLE
