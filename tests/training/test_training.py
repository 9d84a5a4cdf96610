# SPDX-License-Identifier: Apache-2.0
"""The training recipe's parts: a run that can be resumed, latents, clips, the tokenizer, where a model starts."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from longlive_serve.config.presets import DiTConfig
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.text_encoder import END_ID, Tokenizer
from training.latents import Encoder
from training.optimizer import orthogonalize
from training.pool import CHUNK, CHUNKS, make_pool, video_frames
from training.teacher_forcing import TeacherForcingView, flows
from training.text import write_tokenizer
from training.train_dit import DEMO, initialize_dit
from training.trainer import Trainer
from training.world import ALL, Segment, caption, draw

pytestmark = pytest.mark.numeric


class Regression(Trainer):
    """The smallest run: a matrix learns another one."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        super().__init__(model, [*model.parameters()][:1], 0.05, steps, 0, "cpu")

    def rate(self) -> float:
        return 1 - self.step / self.steps

    def losses(self) -> dict[str, Tensor]:
        x = torch.randn(32, 6) * self.generator.random()
        return {"error": (self.model(x) - x[:, :4]).square().mean()}


def test_a_resumed_run_goes_on_exactly_where_it_was(tmp_path: Path) -> None:
    straight = Regression(40)
    first = straight.train_one()["error"]
    expected = straight.train(tmp_path / "none.checkpoint").state_dict()
    stopped = Regression(40)
    for _ in range(25):
        stopped.train_one()
    stopped.save(tmp_path / "run.checkpoint")
    resumed = Regression(40)
    torch.manual_seed(5)
    got = resumed.train(tmp_path / "run.checkpoint").state_dict()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    assert resumed.losses()["error"] < first


@pytest.mark.parametrize("shape", [(8, 8), (6, 24), (24, 6)])
def test_an_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.6


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(clips=40)


def test_a_latent_frame_depends_on_its_own_frames_alone(encoder: Encoder) -> None:
    video = draw([Segment(attributes=ALL[7], frames=17)])
    latents = encoder(video)
    assert latents.shape == (5, 16, 8, 8)
    changed = video.clone()
    changed[5:9] = 1 - changed[5:9]
    differs = (encoder(changed) - latents).abs().amax((1, 2, 3)) > 0
    assert differs.tolist() == [False, False, True, False, False]


def test_the_pool_holds_plain_and_switching_clips(encoder: Encoder) -> None:
    pool = make_pool(encoder, 40, seed=1)
    assert {clip.latents.shape for clip in pool} == {(CHUNK * CHUNKS, 16, 8, 8)}
    assert 10 < sum(clip.switch == 0 for clip in pool) < 30
    for clip in pool:
        new = encoder(draw([Segment(attributes=clip.attributes, frames=video_frames(CHUNKS))]))
        ground, expected = (latents.flatten(2).median(-1).values for latents in (clip.latents, new))
        same_ground = (ground - expected).abs().amax(1) < 1e-3
        assert same_ground[CHUNK * clip.switch :].all()


def test_the_tokenizer_knows_every_caption(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = Tokenizer(DEMO.dit.text_len, tmp_path / "tokenizer")
    generator = random.Random(0)
    for attributes in ALL:
        tokens = tokenizer(caption(attributes, generator))
        assert 2 not in tokens.ids
        assert tokens.ids[0, tokens.length - 1] == END_ID
        assert tokens.full_length == tokens.length
        assert tokens.unknown == ()
    strange = tokenizer("A zebra, a Red zebra -- runs!")
    assert strange.ids[0, :7].tolist() == [*tokenizer("a").ids[0, :1], 2, *tokenizer("a red").ids[0, :2], 2, 2, END_ID]
    assert strange.unknown == ("zebra", "runs")
    assert {"triangle", "purple", "drifts"} <= set(tokenizer.known_words())
    assert not {"<unk>", "</s>", "<pad>"} & set(tokenizer.known_words())


@torch.inference_mode()
def test_a_model_starts_close_to_passing_its_input_through() -> None:
    torch.manual_seed(0)
    config = DiTConfig(dim=128, num_heads=4, num_layers=2, ffn_dim=128, freq_dim=64, text_len=8, text_dim=16)
    model = initialize_dit(config)
    view = TeacherForcingView(Window(DEMO.window), RotaryTables(32, 4, 4, 3), range(2))
    clean, noisy = torch.randn(2, 1, 6, 16, 8, 8)
    prompt_kv = model.embed_prompt(torch.randn(1, 8, 16))
    flow = flows(model, clean, noisy, torch.full((1, 6), 900.0), prompt_kv, view)
    assert torch.corrcoef(torch.stack([flow.flatten(), noisy.flatten()]))[0, 1] > 0.7
