# SPDX-License-Identifier: Apache-2.0
"""The golden files, and the golden rollouts as cases of `longlive_serve.replay`. Needs only safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
ROLLOUTS: dict[str, dict[str, Any]] = {
    "dit_tiny_rollout": {},
    "dit_tiny_switch_mid_sinkT": {"switches": [14, 22]},
    "dit_tiny_switch_mid_sinkF": {"switches": [14, 22], "global_sink": False},
    "dit_tiny_switch_early_sinkT": {"switches": [4, 12]},
    "dit_tiny_infinity": {"relative": True},
    "dit_tiny_infinity_switch": {"switches": [14, 22], "relative": True},
}


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The content of `name`.json and `name`.safetensors; empty for a missing one."""
    facts, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
    if not facts.exists() and not tensors.exists():
        raise FileNotFoundError(f"no golden file {name} in {GOLDEN}")
    found = json.loads(facts.read_text(encoding="utf-8")) if facts.exists() else {}
    return found, load_file(tensors) if tensors.exists() else {}


def write_case(folder: Path, name: str, **changes: Any) -> Path:
    """Write the golden rollout `name` as a case file; `changes` override its fields."""
    facts, inputs = golden("dit_tiny_rollout")
    weights = golden("dit_tiny_weights")[1]
    tensors = {f"weights.{key}": tensor for key, tensor in weights.items()}
    tensors |= {key: inputs[key] for key in inputs if key.startswith("prompt_embeds.")}
    tensors |= {"noise": inputs["noise"], "renoise": inputs["renoise"], "latents": golden(name)[1]["latents"]}
    sizes = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim")
    case = {
        "config": {key: facts["config"][key] for key in sizes},
        "latent": [16, 4, 16],
        "chunks": 10,
        "switches": [],
        "relative": False,
        "global_sink": True,
        "window": 12,
        "sink": 3,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(case | ROLLOUTS.get(name, {}) | changes), encoding="utf-8")
    save_file(tensors, path.with_suffix(".safetensors"))
    return path


def shorten(path: Path, chunks: int) -> None:
    """Truncate a case to its first chunks."""
    case = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(case | {"chunks": chunks}), encoding="utf-8")
    tensors = load_file(path.with_suffix(".safetensors"))
    tensors |= {name: tensors[name][:, : 3 * chunks].contiguous() for name in ("noise", "latents")}
    tensors["renoise"] = tensors["renoise"][: 3 * chunks].contiguous()
    save_file(tensors, path.with_suffix(".safetensors"))
