# SPDX-License-Identifier: Apache-2.0
"""A resumable training run: model, optimisers, averaged weights, random state, progress.

Base of `train_decoder`, `train_dit` and `train_rollouts`, which define the losses.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from training.optimizer import Average, Muon

ADAM_LR = 3e-3
CLIP_NORM = 1.0
SAVE_EVERY = 100  # steps


class Trainer:
    """Base class of the runs: subclasses implement `losses` and `rate`."""

    def __init__(
        self, model: nn.Module, matrices: Sequence[nn.Parameter], muon_lr: float, steps: int, seed: int, device: str
    ) -> None:
        """`matrices`: the parameters that Muon trains; AdamW trains the others."""
        self.steps, self.step, self.device = steps, 0, device
        self.model = model.to(device)
        self.generator = random.Random(seed)
        self.muon_lr = muon_lr
        chosen = {id(parameter) for parameter in matrices}
        self.muon = Muon(matrices, muon_lr)
        others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        self.adam = torch.optim.AdamW(others, ADAM_LR, weight_decay=0.0)
        self.average = Average(model)

    def losses(self) -> dict[str, Tensor]:
        """The losses of one batch by name. Their sum is minimised."""
        raise NotImplementedError

    def rate(self) -> float:
        """The factor of the learning rates at this step."""
        raise NotImplementedError

    def train(self, checkpoint: Path) -> nn.Module:
        """Train to the last step, from the checkpoint if it exists. Returns the model with averaged weights."""
        if checkpoint.exists():
            self.resume(checkpoint)
        columns = (BarColumn(), TextColumn("{task.completed}/{task.total} {task.description}"), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("", total=self.steps, completed=self.step)
            while self.step < self.steps:
                text = ", ".join(f"{name} {value:.4f}" for name, value in self.train_one().items())
                progress.update(task, completed=self.step, description=text)
                if self.step % SAVE_EVERY == 0:
                    progress.console.print(f"step {self.step}: {text}")
                    self.save(checkpoint)
        self.model.load_state_dict(self.average.weights)
        return self.model.cpu().eval()

    def train_one(self) -> dict[str, float]:
        rate = self.rate()
        self.muon.param_groups[0]["lr"] = self.muon_lr * rate
        self.adam.param_groups[0]["lr"] = ADAM_LR * rate
        losses = self.losses()
        self.model.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.muon.step()
        self.adam.step()
        self.average.update(self.model)
        self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.weights,
            "muon": self.muon.state_dict(),
            "adam": self.adam.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "clips_rng": torch.tensor(self.generator.getstate()[1]),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def resume(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.weights = state["average"]
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        torch.set_rng_state(state["torch_rng"])
        self.generator.setstate((3, tuple(state["clips_rng"].tolist()), None))


def arguments(program: str, description: str | None, steps: int) -> argparse.ArgumentParser:
    """A parser with the options of every run."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and the result")
    parser.add_argument("--steps", type=int, default=steps, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    return parser
