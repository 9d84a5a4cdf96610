# SPDX-License-Identifier: Apache-2.0
"""The noise schedule against the reference's numbers, bit for bit."""

from __future__ import annotations

import pytest
import torch

from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler, add_noise, sigma_at, training_sigmas
from tests.support.cases import golden

pytestmark = pytest.mark.numeric


def test_training_sigmas_are_the_reference_ones() -> None:
    """Those that are used bit for bit (below); of all, the reference's last digits depend on its processor."""
    _, tensors = golden("scheduler")
    roundings = 6 * torch.finfo(torch.float32).eps / 2
    torch.testing.assert_close(training_sigmas(), tensors["sigmas"], rtol=roundings, atol=0)
    torch.testing.assert_close(training_sigmas() * 1000, tensors["timesteps"], rtol=roundings, atol=0)


def test_timesteps_and_noise_levels_are_the_reference_ones() -> None:
    facts, tensors = golden("scheduler")
    schedule = FlowMatchScheduler()
    assert torch.equal(schedule.timesteps, tensors["denoising_steps"])
    for step in range(schedule.steps):
        point = facts["points"][f"t{step}"]
        assert schedule.timesteps[step].item() == float.fromhex(point["t_hex"])
        assert schedule.sigmas[step].item() == float.fromhex(point["sigma_hex"])
    assert sigma_at(torch.tensor(0.0)).item() == float.fromhex(facts["points"]["t4"]["sigma_hex"])


@pytest.mark.parametrize("suffix", ["", "_bf16"])
@pytest.mark.parametrize("step", range(4))
def test_adding_noise_and_taking_it_off_are_bit_equal(step: int, suffix: str) -> None:
    _, tensors = golden("scheduler")
    dtype = torch.bfloat16 if suffix else torch.float32
    x, noise, flow = (tensors[name].to(dtype) for name in ("x", "noise", "flow"))
    schedule = FlowMatchScheduler()
    assert torch.equal(schedule.add_noise(x, noise, step), tensors[f"add_noise{suffix}.t{step}"])
    assert torch.equal(schedule.convert_flow_pred_to_x0(x, flow, step), tensors[f"x0{suffix}.t{step}"])


def test_the_clean_end_of_the_table_is_bit_equal() -> None:
    _, tensors = golden("scheduler")
    sigma = sigma_at(torch.tensor(0.0))
    assert torch.equal(add_noise(tensors["x"], tensors["noise"], sigma), tensors["add_noise.t4"])
