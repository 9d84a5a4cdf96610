# SPDX-License-Identifier: Apache-2.0
"""Compares videos of a quantized model with those of the unquantized one, from the same prompts and noise.

Called by `evaluate`; runs in the processes of `training.quality.workers`, on the demo model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from quantization.flow_errors import relative_error
from training.quality.measures import QualityCase
from training.quality.reader import read

CHUNKS = 80  # 957 frames, 60 s
STD_BOUNDS = (0.9, 1.1)  # standard deviation of the latents, relative to the unquantized ones
GROWTH_BOUND = 1.5  # of the error, from the second to the last quarter of a video


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Rollout:
    """A session's output."""

    latents: Tensor
    """Clean latents [chunks, frames, channels, h, w]."""
    frames: list[Tensor]
    """Per chunk, uint8 [9 or 12, height, width, 3]."""


def roll_out(runner: ModelRunner, case: QualityCase) -> Rollout:
    """Generate a video of 60 s."""
    first = Prompt(index=0, text=case.script.prompts[0])
    session = Session(id="rollout", prompt=first, noise=SeededNoise(case.script.seed), slot=0)
    latents, frames = [], []
    for _ in range(CHUNKS):
        frames.append(torch.from_numpy(runner.advance(session).frames))
        latents.append(session.context_latents[-1][0].clone())
    return Rollout(latents=torch.stack(latents), frames=frames)


def compare(output: Sequence[Rollout], expected: Sequence[Rollout], cases: Sequence[QualityCase]) -> dict[str, Any]:
    """Errors of the rollouts by chunk (means over the cases), and whether they stay bounded."""
    pairs = list(zip(output, expected, strict=True))
    chunks = range(CHUNKS)
    errors = [fmean([relative_error(a.latents[chunk], b.latents[chunk]) for a, b in pairs]) for chunk in chunks]
    spread = [fmean([(a.latents[chunk].std() / b.latents[chunk].std()).item() for a, b in pairs]) for chunk in chunks]
    right = [
        all(read(torch.cat(a.frames[-2:])).agrees(case.attributes).values())
        for a, case in zip(output, cases, strict=True)
    ]
    quarter = CHUNKS // 4
    return {
        "latent_rel_error": fmean(errors),
        "latent_rel_error_after_chunk_1": errors[0],
        "latent_rel_error_after_chunk_20": errors[19],
        "latent_rel_error_after_60s": errors[-1],
        "latent_rel_error_by_chunk": errors,
        "latent_std_ratio_by_chunk": spread,
        "latent_std_ratio_range": [min(spread), max(spread)],
        "error_growth": growth(errors, quarter),
        "rollout_bounded": bounded(errors, spread),
        "attributes_right_at_60s": fmean([float(correct) for correct in right]),
        "psnr_db_by_chunk": [psnr([(a.frames[chunk], b.frames[chunk]) for a, b in pairs]) for chunk in chunks],
        "psnr_db": psnr([(torch.cat(a.frames), torch.cat(b.frames)) for a, b in pairs]),
    }


def growth(errors: Sequence[float], quarter: int) -> float:
    """Mean error of the last quarter relative to the second; in the first, the window is not full yet."""
    second = fmean(errors[quarter : 2 * quarter])
    return fmean(errors[-quarter:]) / second if second else 1.0


def bounded(errors: Sequence[float], spread: Sequence[float]) -> bool:
    """Whether the rollout does not drift: its standard deviation stays in bounds and its error does not grow."""
    inside = STD_BOUNDS[0] <= min(spread) and max(spread) <= STD_BOUNDS[1]
    return inside and growth(errors, len(errors) // 4) <= GROWTH_BOUND


def psnr(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """PSNR in dB of uint8 frames, over all pairs together; 99 if they are equal."""
    squares = fmean([(a.float() - b.float()).square().mean().item() for a, b in pairs])
    return min(99.0, -10 * float(torch.tensor(max(squares, 1e-12) / 255**2).log10()))
