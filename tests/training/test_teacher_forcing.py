# SPDX-License-Identifier: Apache-2.0
"""Training sees what serving sees: all chunks at once equal the chunk-by-chunk way through the cache."""

from __future__ import annotations

import pytest
import torch

from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import PRESETS
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.dit.kv_cache import Window
from tests.support.tolerance import Float64, error
from training.teacher_forcing import TeacherForcingView, flows

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("step", [0, 3])
@torch.inference_mode()
def test_all_chunks_at_once_equal_one_after_the_other(step: int) -> None:
    config = PRESETS["tiny"]
    torch.manual_seed(0)
    model = CausalDiT(config.dit).eval().double()
    clean, noisy = torch.randn(2, 1, 18, 16, config.latent_height, config.latent_width).double()
    text = torch.randn(1, config.dit.text_len, config.dit.text_dim)
    dit, window = TorchDiT(model, config, 1, "base"), Window(config.window)
    with Float64():
        keys, values = prompt_kv = dit.embed_prompt(text, text.shape[1])
        expected = []
        for chunk in range(6):
            plan, frames = window.step(chunk), slice(3 * chunk, 3 * chunk + 3)
            expected.append(dit.denoise(noisy[:, frames], step, prompt_kv, 0, plan))
            dit.update_kv_cache(clean[:, frames], prompt_kv, 0, plan)
        timesteps = dit.timesteps[step].expand(1, 18)
        view = TeacherForcingView(window, dit.tables, range(6))
        got = flows(model, clean, noisy, timesteps, (keys, values), view)
    assert error(got, torch.cat(expected, 1)) < 1e-10
