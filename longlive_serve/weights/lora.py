# SPDX-License-Identifier: Apache-2.0
"""Reads LoRA adapters and merges them into weights: W + scale * (alpha / rank) * B A.

Called by `checkpoint` and `loader`. Merges are computed in float32 on the CPU, so that they give the same bits for
every device. Names and shapes: docs/semantics.md, section 10.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longlive_serve.config.serve_config import Adapter
from longlive_serve.weights.tensor_files import listed, read_tensors

log = logging.getLogger(__name__)

LORA_KEY = "generator_lora"  # the adapter's key in a torch file with further contents
_PREFIXES = ("base_model.model.", "diffusion_model.")  # peft's, as published, and ComfyUI's
_NAME = re.compile(r"(?P<layer>.+)\.lora_(?P<half>[AB])(?:\.default)?\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LowRank:
    """An adapter's update of one weight: factor * B A."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]
    factor: float

    def added_to(self, weight: Tensor) -> Tensor:
        """weight [out, in], any float dtype -> float32 on the CPU."""
        delta = self.b.float() @ self.a.float()
        return delta.mul_(self.factor).add_(weight)


Updates = dict[str, list[LowRank]]
"""Updates by weight name, in the order of the adapters."""


@torch.no_grad()
def merged_state(state: Mapping[str, Tensor], adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """The DiT's tensors with adapters merged: changed weights in float32 on the CPU, the others unchanged."""
    updates = read_adapters(adapters, {name: tensor.shape for name, tensor in state.items()})
    return {name: merged(tensor, updates.get(name, ())) for name, tensor in state.items()}


@torch.no_grad()
def merged(weight: Tensor, updates: Sequence[LowRank]) -> Tensor:
    """The weight with the updates added; without updates the same tensor."""
    if updates:
        weight = weight.cpu()
    for update in updates:
        weight = update.added_to(weight)
    return weight


def read_adapters(adapters: Sequence[Adapter], shapes: Mapping[str, Sequence[int]]) -> Updates:
    """The adapters' updates for a model whose tensors have these names and shapes.

    Raises ValueError that names the file and every layer that does not exist or does not fit.
    """
    updates: Updates = {}
    for adapter in adapters:
        layers, errors = _layers(read_tensors(adapter.path, (LORA_KEY,)))
        for layer, factors in layers.items():
            errors += _layer_errors(layer, factors, shapes.get(f"{layer}.weight"))
        if errors:
            raise ValueError(
                f"{adapter.path}: not an adapter of this DiT:\n  " + listed(errors, "\n  ") + "\n"
                "Expected lora_A [rank, in] and lora_B [out, rank] of the DiT's layers; set another file in `lora`"
            )
        for layer, factors in layers.items():
            rank = len(factors["A"])
            factor = adapter.scale * ((adapter.alpha or rank) / rank)
            updates.setdefault(f"{layer}.weight", []).append(LowRank(a=factors["A"], b=factors["B"], factor=factor))
        ranks = ", ".join(map(str, sorted({len(factors["A"]) for factors in layers.values()})))
        alpha = f"{adapter.alpha:g}" if adapter.alpha else "as rank"
        text = "dit: merging %s into %d layers: rank %s, alpha %s, scale %g"
        log.info(text, adapter.path, len(layers), ranks, alpha, adapter.scale)
    return updates


def rank_of(adapter: Adapter) -> int:
    """The largest rank in the file."""
    state = read_tensors(adapter.path, (LORA_KEY,))
    return max((len(tensor) for name, tensor in state.items() if ".lora_A." in name), default=0)


def _layers(state: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """The two factors of each layer, and errors for other names."""
    layers: dict[str, dict[str, Tensor]] = {}
    errors = []
    for name, tensor in state.items():
        plain = name.replace("_fsdp_wrapped_module.", "")
        for prefix in _PREFIXES:
            plain = plain.removeprefix(prefix)
        if match := _NAME.fullmatch(plain):
            layers.setdefault(match["layer"], {})[match["half"]] = tensor
        else:
            errors.append(f"unexpected {name}")
    return layers, errors


def _layer_errors(layer: str, factors: Mapping[str, Tensor], weight: Sequence[int] | None) -> list[str]:
    """Errors in the factors of a layer."""
    if weight is None:
        return [f"{layer}: the model has no such layer"]
    if len(factors) < 2:
        return [f"{layer}: got lora_{next(iter(factors))} alone, expected lora_A and lora_B"]
    a, b = factors["A"].shape, factors["B"].shape
    if len(weight) != 2 or len(a) != 2 or tuple(b) != (weight[0], a[0]) or a[1] != weight[1]:
        return [f"{layer}: got lora_A {list(a)} and lora_B {list(b)}, expected them for a weight {list(weight)}"]
    if not all(half.is_floating_point() for half in factors.values()):
        return [f"{layer}: got {factors['A'].dtype} and {factors['B'].dtype}, expected float dtypes"]
    return []
