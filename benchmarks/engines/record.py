# SPDX-License-Identifier: Apache-2.0
"""The figures of a run in a JSON file: its own section, and on top those that others look up."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results import Measurement, cpu
from longlive_serve.config.presets import TINY, WAN

SECTION = "benchmarks.engines"
CODE = ("longlive_serve", ":!longlive_serve/doctor", "benchmarks/engines")


def top_figures(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """What a run comes down to. None: no row tells, or none of that precision.

    Frames per second and sessions are those of our fastest backend with each decoder, the VAE included. The first
    frame and a prompt switch are those of the one with the Wan VAE. The speed-up is that of the fastest which rounds as
    the baseline does, and apart from it that of the fastest in FP8; both with the Wan VAE.
    """
    full, tiny = fastest(rows, WAN), fastest(rows, TINY)
    eager = next((row for row in rows if row["baseline"]), None)
    ours = [row for row in rows if not row["baseline"]]
    alike = fastest([row for row in ours if eager and row["dtype"] == eager["dtype"] and not row["fp8"]], WAN)
    in_fp8 = fastest([row for row in ours if row["fp8"]], WAN)
    return {
        "dit_fps_bf16": max((r["dit_fps"] for r in ours if r["dtype"] == "bfloat16" and not r["fp8"]), default=None),
        "dit_fps_fp8": max((row["dit_fps"] for row in ours if row["fp8"]), default=None),
        "fps_full_vae": full["fps"] if full else None,
        "fps_tiny_vae": tiny["fps"] if tiny else None,
        "first_frame_s": full["first_frame_s"]["median"] if full else None,
        "switch_p95_s": full["switch_s"]["p95"] if full else None,
        "live_sessions_full_vae": full["live"]["sessions"] if full else None,
        "live_sessions_tiny_vae": tiny["live"]["sessions"] if tiny else None,
        "speedup_vs_eager": alike["fps"] / eager["fps"] if alike and eager else None,
        "speedup_vs_eager_fp8": in_fp8["fps"] / eager["fps"] if in_fp8 and eager else None,
    }


def fastest(rows: Sequence[dict[str, Any]], decoder: str) -> dict[str, Any] | None:
    """Our fastest row with this decoder, the decoder's time included."""
    ours = [row for row in rows if not row["baseline"] and row["decoder"] == decoder]
    return max(ours, key=lambda row: row["fps"], default=None)


def write_record(path: Path, made: Measurement, record: dict[str, Any]) -> None:
    """Put a run's record into its section of the file, and its figures on top; the other sections stay."""
    whole: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    whole |= top_figures(record["rows"])
    best = {name: fastest(record["rows"], decoder) for name, decoder in (("full_vae", WAN), ("tiny_vae", TINY))}
    whole[SECTION] = {
        **made.header(hardware=hardware(record["device"]), versions=versions(), code=CODE),
        "figures_of": {name: row and row["name"] for name, row in best.items()},
        **record,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


def hardware(device: str) -> str:
    if not device.startswith("cuda"):
        return cpu()
    facts = torch.cuda.get_device_properties(device)
    return f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {facts.multi_processor_count} multiprocessors"


def versions() -> dict[str, str]:
    """Of what the figures depend on; of Triton only where it is installed."""
    found = {"python": platform.python_version(), "numpy": np.__version__, "torch": str(torch.__version__)}
    asked: dict[str, Callable[[], object]] = {
        "cuda": lambda: torch.version.cuda,
        "cudnn": torch.backends.cudnn.version,
        "transformers": lambda: import_module("transformers").__version__,
        "triton": lambda: import_module("triton").__version__,
        "onnxruntime": lambda: import_module("onnxruntime").__version__,
        "tensorrt": lambda: import_module("tensorrt").__version__,
        "cudnn-frontend": lambda: import_module("cudnn").__version__,
    }
    for name, ask in asked.items():
        try:
            version = ask()
        except ImportError:
            version = None
        if version is not None:
            found[name] = str(version)
    return found
