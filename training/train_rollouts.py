# SPDX-License-Identifier: Apache-2.0
"""Continues the training of the demo model's DiT on its own videos: `python -m training.train_rollouts --out FOLDER`.

FOLDER holds the output of `train_decoder` and `train_dit`; the DiT and the text encoder in it are replaced at the end.
Ctrl-C stops a run; run again, it continues from its checkpoint (videos in progress restart).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from longlive_serve.backends.base import PromptKV
from longlive_serve.config.presets import DIT, PRESETS, TEXT_ENCODER
from longlive_serve.models.dit.causal_dit import PATCH, CausalDiT
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.dit.rope import MAX_FRAMES, RotaryTables
from longlive_serve.models.text_encoder import TextEncoder
from longlive_serve.weights.loader import ModelLoader
from training.latents import HELD_OUT, Encoder, random_attributes
from training.pool import CHUNK
from training.rollouts import Rollout
from training.text import token_batch
from training.train_dit import MUON_LR, save
from training.trainer import Trainer, arguments
from training.world import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Attributes, caption

DEMO = PRESETS["demo"]
SESSIONS = 16  # in lockstep
SHORT_VIDEO = 6  # maximum chunks of a brief video, which gets every third step
MAX_CHUNKS = 100  # maximum chunks of the other videos
MAX_START_CHUNK = MAX_FRAMES // CHUNK - MAX_CHUNKS  # latest chunk at which a session may start
SWITCH = 0.12  # share of chunk boundaries with a prompt switch
UNKNOWN = 0.15  # share of captions with unknown words
MAX_RATE, WARM_UP = 0.35, 20  # maximum learning rate relative to `train_dit`


@dataclasses.dataclass(kw_only=True)
class Video:
    """A roll-out, its prompts and its last chunk."""

    rollout: Rollout
    max_chunks: int
    end: int = 0
    captions: list[str] = dataclasses.field(default_factory=list)
    started_late: bool = False


class RolloutTrainer(Trainer):
    """Trains on one chunk of a batch of sessions per step."""

    def __init__(self, folder: Path, steps: int, seed: int) -> None:
        torch.manual_seed(seed)
        loader = ModelLoader.open(DEMO, str(folder))
        self.dit: CausalDiT = loader.load_model(DIT, "cpu", torch.float32).train()
        self.text_encoder: TextEncoder = loader.load_model(TEXT_ENCODER, "cpu", torch.float32).train()
        self.tokenizer = loader.load_tokenizer()
        matrices = [p for block in self.dit.blocks for p in block.parameters() if p.ndim == 2]
        both = nn.ModuleDict({"dit": self.dit, "text_encoder": self.text_encoder}).requires_grad_(True)
        super().__init__(both, matrices, MUON_LR, steps, seed, "cpu")
        grid = (DEMO.latent_height // PATCH, DEMO.latent_width // PATCH)
        tables, encoder = RotaryTables(DEMO.dit.head_dim, *grid, CHUNK), Encoder.fit()
        self.videos = [
            Video(rollout=Rollout(self.dit, Window(DEMO.window), tables, encoder), max_chunks=max_chunks)
            for max_chunks in (SHORT_VIDEO, MAX_CHUNKS, MAX_CHUNKS)
        ]

    def rate(self) -> float:
        return MAX_RATE * min(1.0, (self.step + 1) / WARM_UP, (1 - self.step / self.steps) / 0.5)

    def losses(self) -> dict[str, Tensor]:
        video = self.videos[self.step % len(self.videos)]
        rollout, random = video.rollout, self.generator
        rollout.cache.detach()
        if rollout.chunk >= video.end:
            self.begin(video)
        attributes_list, switch = (
            rollout.attributes,
            rollout.chunk > 0 and (video.started_late or random.random() < SWITCH),
        )
        if switch:
            attributes_list = [self.changed(look) for look in attributes_list]
            video.captions = [self.caption(look) for look in attributes_list]
        video.started_late = False
        loss = rollout.advance(attributes_list, self.prompt_kv(video.captions), switch, keep_sink=random.random() < 0.7)
        return {"brief" if video.max_chunks == SHORT_VIDEO else "long": loss}

    def begin(self, video: Video) -> None:
        """Start new videos; half of the long ones start in the middle of a session, at a prompt switch."""
        random = self.generator
        attributes_list = [random_attributes(random) for _ in range(SESSIONS)]
        video.captions = [self.caption(look) for look in attributes_list]
        video.started_late = video.max_chunks > SHORT_VIDEO and random.random() < 0.5
        if video.started_late:
            chunk = int(math.exp(random.uniform(0, math.log(MAX_START_CHUNK))))
            video.rollout.join(attributes_list, self.prompt_kv(video.captions), chunk, random)
        else:
            video.rollout.begin(attributes_list)
        video.end = video.rollout.chunk + int(math.exp(random.uniform(0, math.log(video.max_chunks + 1))))

    def changed(self, look: Attributes) -> Attributes:
        """The attributes after a switch: none, one or all change. Never a held-out combination."""
        random = self.generator
        kind = random.random()
        if kind < 0.1:
            return look
        if kind < 0.6:
            return random_attributes(random)
        name, values = random.choice(
            [("shape", SHAPES), ("colour", [*COLOURS]), ("motion", [*MOTIONS]), ("background", [*BACKGROUNDS])]
        )
        after = dataclasses.replace(look, **{name: random.choice(values)})
        return look if after in HELD_OUT else after

    def caption(self, look: Attributes) -> str:
        words = caption(look, self.generator).split()
        if self.generator.random() < UNKNOWN:
            for _ in range(self.generator.randrange(1, 5)):
                words.insert(self.generator.randrange(len(words) + 1), "something")
        return " ".join(words)

    def prompt_kv(self, captions: list[str]) -> PromptKV:
        return self.dit.embed_prompt(self.text_encoder(*token_batch(self.tokenizer, captions, self.device)))


def main() -> int:
    parser = arguments("training.train_rollouts", __doc__, steps=5200)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error(f"--device: got {args.device}, expected cpu: the targets are drawn there")
    trainer = RolloutTrainer(args.out, args.steps, args.seed)
    trainer.train(args.out / "rollouts.checkpoint")
    save(trainer.dit, trainer.text_encoder, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
