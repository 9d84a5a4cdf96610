# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for an H200: the interpreter runs what no GPU would. And what a GPU would be given is counted."""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_serve import kernels
from longlive_serve.config.presets import DIT, PRESETS, VAE_DECODER
from tests.fakes.launches import counted

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("machine-code")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.machine_code",
        "--preset",
        "tiny",
        "--json",
        str(folder / "found.json"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return record


def test_every_kernel_compiles_and_none_spills_registers(found: dict[str, Any]) -> None:
    modules = [import_module(f"{kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)]
    ours = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert {kernel["name"] for kernel in found["kernels"]} == ours
    assert [kernel["name"] for kernel in found["kernels"] if kernel["stack"]] == []


def test_attention_multiplies_with_hoppers_instructions_for_groups_of_warps(found: dict[str, Any]) -> None:
    products = [kernel["products"] for kernel in found["kernels"] if kernel["name"] == "_attention_kernel"]
    bfloat16, fp8 = "HGMMA.64x128x16.F32.BF16", "QGMMA.64x128x32.F32.E4M3.E4M3"
    assert products == [[bfloat16], [bfloat16], [fp8]]


def test_kernels_of_rows_load_16_bytes_at_a_time_and_fill_half_a_multiprocessor(found: dict[str, Any]) -> None:
    of_rows = [kernel for kernel in found["kernels"] if kernel["name"] != "_attention_kernel"]
    assert min(kernel["occupancy"] for kernel in of_rows) >= 0.5
    for kernel in of_rows:
        instructions = kernel["instructions"]
        assert instructions["16-byte load"] >= 2 * instructions.get("narrower load", 0), kernel["name"]


def test_a_chunk_has_the_kernels_that_its_layers_come_to(found: dict[str, Any]) -> None:
    """14 a layer and pass: three norms, six products, two attentions, RoPE, the norm of queries, GELU. The last layer
    of the fifth pass has only the first three."""
    layers, chunk = PRESETS["tiny"].dit.num_layers, found["chunk"]
    of_layers = 5 * 14 * layers - 11
    beside = chunk[DIT]["fused"]["launches"] - of_layers
    assert beside == 4 * 5 + 2  # patches and their bias, and but in the last pass the head: norm, product, frames
    fp8 = chunk[DIT]["fused fp8"]["launches"] - chunk[DIT]["fused"]["launches"]
    assert fp8 == 2 * (5 * layers - 1)  # what attention gives is quantized by a kernel of its own
    for model in (DIT, VAE_DECODER):
        eager, fused = chunk[model]["eager baseline"], chunk[model]["fused"]
        assert fused["launches"] < eager["launches"] / 3
        assert fused["bytes"] < eager["bytes"]


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def test_what_a_kernel_reads_and_writes_is_counted() -> None:
    x, weight, bias = meta(2, 3, 8, 8), meta(4, 3, 1, 1), meta(4)
    cases = {
        "a sum": (lambda: x + x, 1, 3 * 1536),
        "a sum in place": (lambda: x.add_(1), 1, 2 * 1536),
        "a copy": (lambda: x.copy_(x.clone()), 2, 4 * 1536),
        "views": (lambda: x.view(6, 64).t()[:3].expand(2, 3, 6), 0, 0),
        "room": (lambda: torch.empty_like(x), 0, 0),
        "zeros": (x.zero_, 1, 1536),
        "what is expanded": (lambda: x + meta(1).expand(2, 3, 8, 8), 1, 2 * 1536 + 4),
        "a convolution": (lambda: F.conv2d(x, weight), 1, 1536 + 48 + 2048),
        "its bias": (lambda: F.conv2d(x, weight, bias), 2, 1536 + 48 + 2048 + 16 + 2 * 2048),
        "attention": (lambda: F.scaled_dot_product_attention(x, x, x), 1, 4 * 1536),
    }
    for name, (run, launches, size) in cases.items():
        with counted() as work:
            run()
        assert (work.launches, work.bytes) == (launches, size), name
