# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for Hopper at their real sizes, on a machine without a GPU; nothing is launched.

`TRITON_INTERPRET=0 python -m tests.hopper_on_cpu` prints a line for each: what it takes of a multiprocessor, and its
matrix instructions. A stack means that registers spill. With `all`, every tile size of attention and not only one.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from longlive_serve.kernels.attention import attention, attention_fp8
from longlive_serve.kernels.norm_silu import norm_silu
from longlive_serve.kernels.norms import residual_norm, rms_norm
from longlive_serve.kernels.quantize import gelu, quantize_rows
from longlive_serve.kernels.rotary import norm_rotate_write, rotate_keys

SHARED_MEMORY = 232448  # bytes that a block may have
TOKENS, WINDOW, WIDTH, HEADS, HEAD, INNER = 4680, 18720, 1536, 12, 128, 8960


class Hopper:
    """What Triton asks of a driver, for a GPU that is not there."""

    def __init__(self, every_tile: bool) -> None:
        self.every_tile = every_tile
        properties = {"max_shared_mem": SHARED_MEMORY}
        self.utils = SimpleNamespace(load_binary=describe, get_device_properties=lambda _: properties)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_, **__: None

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        times = iter(range(1, 1000))

        def benchmark(call: Callable[[], None], quantiles: Sequence[float]) -> Sequence[float]:
            time = next(times)
            if self.every_tile:
                call()
            return [time for _ in quantiles]  # the first is the fastest, and compiled in any case

        return benchmark


def describe(name: str, binary: bytes, shared: int, _: int) -> tuple[None, None, int, int, int]:
    """Takes the place of loading a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        products = re.findall(r"[HQ]GMMA\.\S+", _cuobjdump("-sass", file.name)) if "attention" in name else []
    registers, stack = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    print(f"{name}: {registers} registers, {stack} stack, {shared} shared", *sorted(set(products)))
    return None, None, registers, 0, 1024


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def kernels_of_rows() -> None:
    x = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16)
    inner, vector = x.new_zeros(TOKENS, INNER), x.new_zeros(WIDTH)
    residual_norm(x, x, vector, vector, vector, eps=1e-6, one_plus=True, fp8=True)
    rms_norm(x, vector, eps=1e-6)
    quantize_rows(x)
    gelu(inner, fp8=True)
    qkv, angles = x.new_zeros(TOKENS, 3 * WIDTH), torch.zeros(WINDOW, HEAD // 2)
    for dtype, scales in ((x.dtype, None), (torch.float8_e4m3fn, torch.ones(3))):
        queries = torch.zeros(TOKENS, HEADS, HEAD, dtype=dtype).transpose(0, 1)
        cache = torch.zeros(HEADS, WINDOW, HEAD, dtype=dtype)
        norm_rotate_write(
            qkv, vector, vector, angles[:TOKENS], angles[:TOKENS], queries, cache, cache,
            first_row=TOKENS, eps=1e-6, rotate_keys=True, scales=scales,
        )  # fmt: skip
        rotate_keys(cache, angles, angles, cache)
    frames = x.new_zeros(1, 96, 4, 60, 104).to(memory_format=torch.channels_last_3d)
    norm_silu(frames, vector[:96], frames)
    norm_silu(frames, vector[:96], frames, bias=vector[:96], added=frames, keep=True)


def kernels_of_attention() -> None:
    queries = torch.zeros(HEADS, TOKENS, HEAD, dtype=torch.bfloat16)
    cache = queries.new_zeros(HEADS, WINDOW, HEAD)
    attention(queries, cache, cache)
    attention(queries, cache[:, :101], cache[:, :101], key_bias=torch.zeros(101))
    small = cache.to(torch.float8_e4m3fn)
    attention_fp8(small[:, :TOKENS], small, small, torch.ones(3))


if __name__ == "__main__":
    triton.runtime.driver.set_active(Hopper(every_tile="all" in sys.argv))
    kernels_of_rows()
    kernels_of_attention()
