# SPDX-License-Identifier: Apache-2.0
"""Writes a run's results to a JSON file: in their own section, and the main ones at the top level."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Measurement, versions
from longlive_serve.config.presets import TINY, WAN

SECTION = "benchmarks.engines"
PACKAGES = ("numpy", "torch", "transformers", "triton", "onnxruntime", "tensorrt-cu13", "nvidia-cudnn-frontend")
CODE = ("longlive_serve", ":!longlive_serve/doctor", "benchmarks/engines")


def top_level_results(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """The main results of a run. None: no row of that kind or precision was measured.

    Frames per second and sessions: the fastest backend with each decoder, VAE time included. First frame and prompt
    switch: the fastest backend with the Wan VAE. Speed-up: the fastest backend with the Wan VAE and the baseline's
    precision, and separately the fastest one with FP8.
    """
    full, tiny = fastest(rows, WAN), fastest(rows, TINY)
    eager = next((row for row in rows if row["baseline"]), None)
    own_rows = [row for row in rows if not row["baseline"]]
    same_precision = fastest(
        [row for row in own_rows if eager and row["dtype"] == eager["dtype"] and not row["fp8"]], WAN
    )
    in_fp8 = fastest([row for row in own_rows if row["fp8"]], WAN)
    return {
        "dit_fps_bf16": max(
            (r["dit_fps"] for r in own_rows if r["dtype"] == "bfloat16" and not r["fp8"]), default=None
        ),
        "dit_fps_fp8": max((row["dit_fps"] for row in own_rows if row["fp8"]), default=None),
        "fps_full_vae": full["fps"] if full else None,
        "fps_tiny_vae": tiny["fps"] if tiny else None,
        "first_frame_s": full["first_frame_s"]["median"] if full else None,
        "switch_p95_s": full["switch_s"]["p95"] if full else None,
        "live_sessions_full_vae": full["live"]["sessions"] if full else None,
        "live_sessions_tiny_vae": tiny["live"]["sessions"] if tiny else None,
        "speedup_vs_eager": same_precision["fps"] / eager["fps"] if same_precision and eager else None,
        "speedup_vs_eager_fp8": in_fp8["fps"] / eager["fps"] if in_fp8 and eager else None,
    }


def fastest(rows: Sequence[dict[str, Any]], decoder: str) -> dict[str, Any] | None:
    """The fastest row with this decoder, without the baseline; decoder time included."""
    own_rows = [row for row in rows if not row["baseline"] and row["decoder"] == decoder]
    return max(own_rows, key=lambda row: row["fps"], default=None)


def write_record(path: Path, measurement: Measurement, record: dict[str, Any]) -> None:
    """Put a run's record into its section of the file, and its results at the top level; the other sections stay."""
    best = {name: fastest(record["rows"], decoder) for name, decoder in (("full_vae", WAN), ("tiny_vae", TINY))}
    measurement.write(
        path,
        {"figures_of": {name: row and row["name"] for name, row in best.items()}, **record},
        code=CODE,
        hardware=hardware(record["device"]),
        versions=torch_versions(),
        section=SECTION,
        top_level=top_level_results(record["rows"]),
    )


def hardware(device: str) -> str:
    """The GPU; empty for the CPU."""
    if not device.startswith("cuda"):
        return ""
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, {properties.multi_processor_count} multiprocessors"


def torch_versions() -> dict[str, str]:
    """Versions of all libraries that affect a backend's speed."""
    libraries = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return versions(*PACKAGES) | {name: str(version) for name, version in libraries.items() if version is not None}
