# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels for Hopper at their real sizes, on a machine without a GPU; nothing is launched.

Used by `tests.benchmarks.machine_code`, which reports each kernel's resources and instructions.
"""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
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

SHARED_MEMORY = 232448  # maximum bytes per block
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 233472, 64, 32  # per multiprocessor
RESERVED = 1024  # bytes of shared memory that CUDA reserves per block
INSTRUCTIONS = {
    "matrix": r"[HQI]G?MMA\.",
    "special function": r"MUFU\.",
    "float32": r"F(ADD|MUL|FMA|SET|SETP|MNMX|SEL)\b",
    "conversion": r"F2F|F2FP|I2F|F2I|HADD2\.F32",
    "16-byte load": r"LDG\.\S*128",
    "narrower load": r"LDG\.(?!\S*128)",
    "16-byte store": r"STG\.\S*128",
    "narrower store": r"STG\.(?!\S*128)",
    "asynchronous copy": r"LDGSTS|UTMALDG|UBLKCP",
    "shared memory": r"LDS|STS|LDSM|STSM",
    "shuffle": r"SHFL",
}
"""Regular expressions for kinds of SASS instructions."""
TOKENS, WINDOW, WIDTH, HEADS, HEAD, INNER = 4680, 18720, 1536, 12, 128, 8960


class Hopper:
    """A Triton driver for a GPU that is not present."""

    def __init__(self) -> None:
        self.kernels: list[Kernel] = []
        self._warps = 0
        triton.knobs.compilation.listener = self._compiled
        properties = {"max_shared_mem": SHARED_MEMORY}
        self.utils = SimpleNamespace(load_binary=self._load, get_device_properties=lambda _: properties)

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
            return [time for _ in quantiles]  # the first candidate is the fastest, so it is compiled

        return benchmark

    def _compiled(self, *, metadata: dict[str, Any], **_: Any) -> None:
        self._warps = metadata["num_warps"]

    def _load(self, name: str, binary: bytes, shared: int, _: int) -> tuple[None, None, int, int, int]:
        """Called instead of loading a compiled kernel."""
        kernel = describe(name, binary, shared, self._warps)
        self.kernels.append(kernel)
        return None, None, kernel.registers, 0, 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A compiled kernel."""

    name: str
    registers: int
    """Per thread."""
    stack: int
    """Bytes; more than 0 if registers spill."""
    shared: int
    """Bytes per block."""
    warps: int
    """Per block."""
    instructions: dict[str, int]
    """Static count by kind: a loop's body counts once."""
    products: list[str]
    """Names of its matrix instructions."""

    @property
    def blocks(self) -> int:
        """Concurrent blocks per multiprocessor."""
        of_a_warp = -(-self.registers // 8) * 8 * 32
        by_registers = REGISTERS // (of_a_warp * self.warps)
        return min(by_registers, SHARED // (self.shared + RESERVED), WARPS // self.warps, BLOCKS)

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps in use."""
        return self.blocks * self.warps / WARPS


def describe(name: str, binary: bytes, shared: int, warps: int) -> Kernel:
    """Disassemble a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    registers, stack = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    names = [*_instructions(code)]
    counts = {kind: sum(bool(re.match(pattern, one)) for one in names) for kind, pattern in INSTRUCTIONS.items()}
    return Kernel(
        name=name,
        registers=registers,
        stack=stack,
        shared=shared,
        warps=warps,
        instructions={"all": len(names), **{kind: count for kind, count in counts.items() if count}},
        products=sorted({one for one in names if re.match(INSTRUCTIONS["matrix"], one)}),
    )


def _instructions(code: str) -> Iterator[str]:
    """The names of SASS instructions, without padding."""
    for found in re.finditer(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code, re.MULTILINE):
        if found[1] != "NOP":
            yield found[1]


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


def compiled() -> list[Kernel]:
    """Compile every kernel in each of its call variants; attention only with its first tile size."""
    hopper = Hopper()
    triton.runtime.driver.set_active(hopper)
    kernels_of_rows()
    kernels_of_attention()
    return hopper.kernels
