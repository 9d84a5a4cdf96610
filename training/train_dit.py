# SPDX-License-Identifier: Apache-2.0
"""Trains the demo model's DiT and text encoder together: `python -m training.train_dit --out FOLDER`.

Flow matching at the sampler's noise levels, many chunks of a clip at once (`teacher_forcing`), with plain and switch
clips mixed from the start. Ctrl-C stops a run; run again, it continues from its checkpoint.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from longlive_serve.config.presets import PRESETS, DiTConfig
from longlive_serve.models.dit.causal_dit import PATCH, CausalDiT
from longlive_serve.models.dit.flow_match_scheduler import SHIFT, FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.text_encoder import TextEncoder, Tokenizer, wan_names
from longlive_serve.weights.layouts import DIT_FILE, TEXT_ENCODER_FILE, TOKENIZER_FOLDER
from training.latents import Encoder
from training.pool import CHUNK, CHUNKS, Clip, make_pool
from training.teacher_forcing import TeacherForcingView, flows
from training.text import token_batch, write_tokenizer
from training.trainer import Trainer, arguments
from training.world import caption

DEMO = PRESETS["demo"]
BATCH, OPENINGS = 8, 24  # clips, and first chunks alone: these are the hardest to learn
MUON_LR, WARM_UP = 0.018, 40
HISTORY_NOISE = 0.15  # as a session's history is generated and inexact
FAR_SHARE = 0.4  # share of batches late in a video, to train the base variant's positions


class DiTTrainer(Trainer):
    """Trains flows of whole clips, and of first chunks alone."""

    def __init__(self, tokenizer: Tokenizer, steps: int, clips: int, seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.tokenizer = tokenizer
        self.pool = make_pool(Encoder.fit(), clips, seed)
        self.plain = [clip for clip in self.pool if not clip.switch]
        self.dit, self.text_encoder = initialize_dit(DEMO.dit), TextEncoder(DEMO.text_encoder)
        matrices = [p for block in self.dit.blocks for p in block.parameters() if p.ndim == 2]
        both = nn.ModuleDict({"dit": self.dit, "text_encoder": self.text_encoder})
        super().__init__(both, matrices, MUON_LR, steps, seed, device)
        self.schedule = FlowMatchScheduler(device)
        self.window = Window(DEMO.window)
        grid = (DEMO.latent_height // PATCH, DEMO.latent_width // PATCH)
        self.tables = RotaryTables(DEMO.dit.head_dim, *grid, CHUNK, device)

    def rate(self) -> float:
        return min(1.0, (self.step + 1) / WARM_UP, (1 - self.step / self.steps) / 0.4)

    def losses(self) -> dict[str, Tensor]:
        offset = self.generator.randrange(300) if self.generator.random() < FAR_SHARE else 0
        return {
            "clips": self.loss(self.generator.sample(self.pool, BATCH), CHUNKS, offset),
            "openings": self.loss(self.generator.sample(self.plain, OPENINGS), 1, 0),
        }

    def loss(self, clips: list[Clip], chunks: int, offset: int) -> Tensor:
        """Mean square error of the flow, over the chunks under the clip's caption."""
        clean = torch.stack([clip.latents[: CHUNK * chunks] for clip in clips]).to(self.device)
        noise = torch.randn_like(clean)
        sigmas = self.noise_levels(len(clips), chunks).repeat_interleave(CHUNK, 1)  # [B, F]
        noisy = torch.lerp(clean, noise, sigmas[:, :, None, None, None])
        history = clean + HISTORY_NOISE * torch.rand(len(clips), 1, 1, 1, 1) * torch.randn_like(clean)
        positions = [chunk + (offset if chunk else 0) for chunk in range(chunks)]
        view = TeacherForcingView(self.window, self.tables, positions)
        prompt_kv = self.dit.embed_prompt(self.embeddings(clips))
        got = flows(self.dit, history, noisy, sigmas * 1000, prompt_kv, view)
        first = torch.tensor([clip.switch for clip in clips], device=self.device)[:, None]
        counts = (torch.arange(CHUNK * chunks, device=self.device) // CHUNK >= first).float()
        errors = (got - (noise - clean)).square().mean((2, 3, 4))
        return (errors * counts).sum() / counts.sum()

    def noise_levels(self, batch: int, chunks: int) -> Tensor:
        """One noise level per chunk: 80 % are one of the sampler's four, the others random with the same shift."""
        u = torch.rand(batch, chunks, device=self.device)
        anything = SHIFT * u / (1 + (SHIFT - 1) * u)
        listed = self.schedule.sigmas[torch.randint(4, (batch, chunks), device=self.device)]
        return torch.where(torch.rand(batch, chunks, device=self.device) < 0.8, listed, anything)

    def embeddings(self, clips: list[Clip]) -> Tensor:
        captions = [caption(clip.attributes, self.generator) for clip in clips]
        embeddings: Tensor = self.text_encoder(*token_batch(self.tokenizer, captions, self.device))
        return embeddings


def initialize_dit(config: DiTConfig) -> CausalDiT:
    """A DiT whose initial flow is close to its input, the largest part of the flow."""
    model = CausalDiT(config)
    with torch.no_grad():
        width = config.channels * PATCH * PATCH
        basis = torch.linalg.qr(torch.randn(config.dim, width)).Q
        model.patch_embedding.weight.copy_(basis.view_as(model.patch_embedding.weight))
        nn.init.zeros_(model.patch_embedding.bias)  # type: ignore[arg-type]
        patches = basis.T.view(config.channels, PATCH, PATCH, config.dim).permute(
            1, 2, 0, 3
        )  # channels fastest, like the head
        model.head.head.weight.copy_(patches.reshape(width, config.dim) * 0.7 * (width / config.dim) ** 0.5)
        model.head.head.bias.zero_()
        model.head.modulation.zero_()
        for block in model.blocks:
            block.modulation.zero_()
            block.modulation[:, [2, 5]] = 0.3
    return model


def save(dit: CausalDiT, text_encoder: TextEncoder, folder: Path) -> None:
    """Write both with the published file and tensor names."""
    save_file(dit.state_dict(), folder / DIT_FILE)
    text, names = text_encoder.state_dict(), wan_names(DEMO.text_encoder.num_layers)
    torch.save({wan: text[own] for wan, own in names.items()}, folder / TEXT_ENCODER_FILE)


def main() -> int:
    parser = arguments("training.train_dit", __doc__, steps=1500)
    parser.add_argument("--clips", type=int, default=4000, help="size of the pool (default: %(default)s)")
    args = parser.parse_args()
    write_tokenizer(args.out / TOKENIZER_FOLDER)
    tokenizer = Tokenizer(DEMO.dit.text_len, args.out / TOKENIZER_FOLDER)
    trainer = DiTTrainer(tokenizer, args.steps, args.clips, args.seed, args.device)
    trainer.train(args.out / "dit.checkpoint")
    save(trainer.dit, trainer.text_encoder, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
