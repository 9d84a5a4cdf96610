# SPDX-License-Identifier: Apache-2.0
"""The four noise levels of a chunk: warped timesteps, adding noise, and flow -> clean latents.

Called by the model runner. It holds only constants and draws no noise.
Source: docs/semantics.md, section 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRAIN_TIMESTEPS = 1000
SHIFT = 5.0
DENOISING_STEPS = (1000, 750, 500, 250)  # as listed in the shipped settings, before the warp


def training_sigmas() -> Tensor:
    """The 1000 noise levels that the model was trained on, float32, from 1 downwards."""
    # float64, rounded once: in float32 the last digit of some levels depends on the processor.
    s = torch.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1, dtype=torch.float64)[:-1].float()
    return SHIFT * s / (1 + (SHIFT - 1) * s)


class FlowMatchScheduler:
    """Timesteps and noise levels of the denoising steps, on one device.

    `timesteps` [steps] float32 are inputs of the model; a KV-cache update and a recache use timestep 0.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        sigmas = training_sigmas()
        table = torch.cat([sigmas * TRAIN_TIMESTEPS, torch.zeros(1)])
        timesteps = table[[TRAIN_TIMESTEPS - step for step in DENOISING_STEPS]]
        self.timesteps = timesteps.to(device)
        self.sigmas = torch.stack([sigma_at(timestep) for timestep in timesteps]).to(device)

    @property
    def steps(self) -> int:
        return len(DENOISING_STEPS)

    def convert_flow_pred_to_x0(self, noisy: Tensor, flow: Tensor, step: int) -> Tensor:
        """x0 = x_t - sigma * flow, in float64 as the reference does, cast to flow's dtype."""
        return (noisy.double() - self.sigmas[step].double() * flow.double()).to(flow.dtype)

    def add_noise(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """(1 - sigma) * x0 + sigma * noise at the noise level of `step`, in float32, cast to noise's dtype."""
        return add_noise(clean, noise, self.sigmas[step])


def add_noise(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    return ((1 - sigma) * clean.float() + sigma * noise.float()).to(noise.dtype)


def sigma_at(timestep: Tensor) -> Tensor:
    """The training noise level nearest to `timestep` (a 0-dim tensor), float32."""
    sigmas = training_sigmas()
    distance = (sigmas * TRAIN_TIMESTEPS).double() - timestep.double()
    return sigmas[distance.abs().argmin()]
