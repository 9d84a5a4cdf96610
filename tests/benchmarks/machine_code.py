# SPDX-License-Identifier: Apache-2.0
"""What the fused backend gives a Hopper GPU, against the eager baseline, without one:
`python -m tests.benchmarks.machine_code --json results/machine_code.json`.

Two tables: of a chunk, the kernels that are launched and the bytes that they move, before and after; of
each of our kernels as compiled for sm_90, its registers, how many of its blocks a multiprocessor holds, and its
instructions by kind. Nothing is launched, and no time is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.engines.baseline.dit import EagerDiT
from benchmarks.engines.baseline.vae import as_reference
from benchmarks.engines.models import KINDS
from benchmarks.results import SERVER, Measurement, cpu, read_results, versions
from longlive_serve.config.presets import DIT, PRESETS, VAE_DECODER, ModelConfig
from longlive_serve.kernels.attention import attention_fp8
from longlive_serve.models.dit.adaln import Modulation
from longlive_serve.models.dit.fused_dit import CacheRows, FP8Attention, FusedCausalDiT
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.models.vae.fused_decoder import FusedVAE
from tests.fakes.hopper_on_cpu import compiled
from tests.fakes.launches import Work, counted

SECTION = "tests.benchmarks.machine_code"
STEPS, CHUNK = 4, 8  # denoising steps; a chunk whose window is full
EAGER = "eager baseline"
DTYPE = torch.bfloat16
NAMES = {DIT: "the DiT", VAE_DECODER: "the VAE decoder"}
CODE = (
    *SERVER,
    "benchmarks/engines/baseline",
    "tests/benchmarks/machine_code.py",
    "tests/fakes/launches.py",
    "tests/fakes/hopper_on_cpu.py",
)


class Chunk:
    """The work of one chunk of a model of this size, on no device."""

    def __init__(self, config: ModelConfig) -> None:
        self.config, self.window = config, Window(config.window)
        self.rows = config.window.chunk * config.tokens_per_frame
        size = (1, config.window.chunk, config.dit.channels, config.latent_height, config.latent_width)
        self.latents = self.empty(*size)

    def empty(self, *size: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def model(self, name: str) -> Any:
        with torch.device("meta"):
            return KINDS[name](self.config).to("meta", DTYPE).requires_grad_(False)

    def dits(self) -> dict[str, Callable[[], object]]:
        """The four steps and the KV cache's update, by what runs them."""
        found: dict[str, Callable[[], object]] = {EAGER: self.eager_dit()}
        for name, fp8, fp8_attention in (
            ("fused", False, False),
            ("fused fp8", True, False),
            ("fused fp8 attention", True, True),
        ):
            found[name] = self.fused_dit(fp8, fp8_attention)
        return found

    def eager_dit(self) -> Callable[[], object]:
        dit = EagerDiT(self.model(DIT), self.config, 1)
        before, plan = self.window.step(CHUNK - 1), self.window.step(CHUNK)
        for layer in dit.slots[0].layers:  # the host reads these counters
            layer.global_end, layer.local_end = (
                torch.full((1,), chunks * self.rows) for chunks in (CHUNK - 1, self.window.capacity)
            )
        prompt = (self.empty(1, self.config.dit.text_len, self.config.dit.text_dim),)

        def run() -> None:
            for step in range(STEPS):
                dit.denoise(self.latents, step, prompt, 0, plan)
            dit.update_kv_cache(self.latents, prompt, 0, plan)

        dit.denoise(self.latents, 0, prompt, 0, before)  # the prompt's keys and values, once
        return run

    def fused_dit(self, fp8: bool, fp8_attention: bool) -> Callable[[], object]:
        config, window = self.config.dit, self.window.capacity * self.rows
        small = torch.float8_e4m3fn if fp8_attention else DTYPE
        attention = FP8Attention(
            attention_fn=attention_fp8,
            scales=self.empty(config.num_layers, 3, dtype=torch.float32),
            out_scales=self.empty(config.num_layers, window, 1, dtype=torch.float32),
        )
        attention_fn = torch.nn.functional.scaled_dot_product_attention
        with counted():  # weights are quantized by a kernel of ours
            model = FusedCausalDiT(self.model(DIT), fp8, attention_fn, attention if fp8_attention else None)
        constants = Modulation(blocks=self.empty(config.num_layers, 6, config.dim), head=self.empty(2, config.dim))
        angles = self.empty(self.rows, config.head_dim // 2, dtype=torch.float32)
        cache = functools.partial(self.empty, config.num_layers, config.num_heads, window, config.head_dim, dtype=small)
        rows = CacheRows(
            keys=cache(), values=cache(), first=0, used=window, query_angles=(angles, angles), key_angles=None
        )  # fmt: skip
        prompt = model.embed_prompt(self.empty(1, config.text_len, config.text_dim), config.text_len)

        def run() -> None:
            for step in range(STEPS + 1):
                model.run(self.latents, constants, prompt, rows, update_kv_cache=step == STEPS)

        return run

    def decoders(self) -> dict[str, Callable[[], object]]:
        eager, model = as_reference(self.model(VAE_DECODER)), self.model(VAE_DECODER)
        height, width = self.config.latent_height, self.config.latent_width
        cache = eager.initial_cache(1, height, width, torch.device("meta"), DTYPE)
        fused = FusedVAE(model)
        own = fused.initial_cache(height, width, torch.device("meta"), DTYPE)
        return {
            EAGER: functools.partial(eager, self.latents, cache, False),
            "fused": functools.partial(fused.decode, self.latents, own, False),
        }


def work_of(runs: dict[str, Callable[[], object]]) -> dict[str, Work]:
    found = {}
    for name, run in runs.items():
        with torch.inference_mode(), counted() as work:
            run()
        found[name] = work
    return found


def figures(config: ModelConfig) -> dict[str, Any]:
    chunk = Chunk(config)
    work = {name: work_of(runs) for name, runs in ((DIT, chunk.dits()), (VAE_DECODER, chunk.decoders()))}
    return {
        "preset": config.name,
        "chunk": {name: {row: vars(found) for row, found in rows.items()} for name, rows in work.items()},
        "kernels": [
            {**dataclasses.asdict(kernel), "blocks": kernel.blocks, "occupancy": kernel.occupancy}
            for kernel in compiled()
        ],
    }


def tables(record: dict[str, Any]) -> str:
    """The figures as Markdown."""
    lines = ["| a chunk of | by | kernels launched | bytes moved |", "| --- | --- | --- | --- |"]
    for model, rows in record["chunk"].items():
        lines += [
            f"| {NAMES[model]} | {row} | {found['launches']:,} | {found['bytes'] / 1e9:,.1f} GB |"
            for row, found in rows.items()
        ]
    lines += [
        "",
        "| kernel | registers | shared memory | warps | blocks at once | warps there | instructions |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kernel in record["kernels"]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in kernel["instructions"].items())
        products = f" ({', '.join(kernel['products'])})" if kernel["products"] else ""
        lines.append(
            f"| `{kernel['name'].strip('_').removesuffix('_kernel')}` | {kernel['registers']} | "
            f"{kernel['shared'] / 1024:.0f} KiB | {kernel['warps']} | {kernel['blocks']} | "
            f"{100 * kernel['occupancy']:.0f} % | {kinds}{products} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {SECTION}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    text = "sizes of the chunk (default: %(default)s); those of the kernels are always full"
    parser.add_argument("--preset", choices=PRESETS, default="longlive-1.3b", help=text)
    parser.add_argument("--table", type=Path, metavar="JSON", help="count nothing: print the tables of this file")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        print(tables(read_results(arguments.table)))
        return 0
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET: got 1, expected 0: interpreted kernels have no machine code")
    measurement, record = Measurement.begin(SECTION, argv), figures(PRESETS[arguments.preset])
    if arguments.json is not None:
        hardware = f"{cpu()}, no GPU"
        measurement.write(arguments.json, record, code=CODE, hardware=hardware, versions=versions("torch", "triton"))
    print(tables(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
