# SPDX-License-Identifier: Apache-2.0
"""What several tests share: the golden files, made once with the reference implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`name`.json (empty when there is none) and the tensors of `name`.safetensors (likewise)."""
    facts, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
    if not facts.exists() and not tensors.exists():
        raise FileNotFoundError(f"no golden file {name} in {GOLDEN}")
    return json.loads(facts.read_text()) if facts.exists() else {}, load_file(tensors) if tensors.exists() else {}
