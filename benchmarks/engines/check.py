# SPDX-License-Identifier: Apache-2.0
"""Compares a row's results with the torch backend's: a short video in the measured size, generated twice.

Called by the run before it measures a row. Differences grow from chunk to chunk, with random weights as with trained
ones, so the differences are only reported. A row fails if its first chunk is unrelated to the expected one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.engines.prompts import PROMPTS
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session

CHUNKS = 6  # the window is full before the switch, two chunks before the end
MAX_DIFFERENCE = 0.5
"""Relative error (L2) of the first chunk's latents. Unrelated results have about 1.4."""


class Video(NamedTuple):
    latents: Tensor
    """float32 [chunks, frames, channels, h, w], on the CPU."""
    frames: np.ndarray[Any, Any]
    """uint8 [T, H, W, 3]."""


class WrongResultError(RuntimeError):
    """A row's latents differ too much from the torch backend's."""


def make_video(runner: ModelRunner, chunks: int = CHUNKS) -> Video:
    """Generate a deterministic video with one prompt switch, two chunks before the end."""
    prompt = Prompt(index=0, text=PROMPTS[0])
    session = Session(id="check", prompt=prompt, noise=SeededNoise(0), slot=0)
    latents, frames = [], []
    for chunk in range(chunks):
        if chunk == chunks - 2:
            session.add_prompt(PROMPTS[1], NOW)
        frames.append(runner.advance(session).frames)
        latents.append(session.context_latents[-1].float().cpu())
    return Video(torch.cat(latents), np.concatenate(frames))


def check(runner: ModelRunner, expected: Video) -> dict[str, Any]:
    """Compare a row with the torch backend, chunk by chunk. Raises WrongResultError."""
    video, repeated = (make_video(runner, len(expected.latents)) for _ in range(2))
    differences = [relative_error(one, other) for one, other in zip(video.latents, expected.latents, strict=True)]
    if not differences[0] < MAX_DIFFERENCE:
        raise WrongResultError(
            f"the first chunk's latents: got a relative error of {differences[0]:.3g}, expected below {MAX_DIFFERENCE}"
        )
    return {
        "latents_off": differences,
        "frames_off": float(np.abs(video.frames.astype(np.int16) - expected.frames).mean()),
        "same_twice": torch.equal(video.latents, repeated.latents) and np.array_equal(video.frames, repeated.frames),
    }
