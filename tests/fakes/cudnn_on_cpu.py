# SPDX-License-Identifier: Apache-2.0
"""A fake of cuDNN's frontend: attention and convolution graphs, computed on the CPU at the given addresses.

It follows the documentation and has no real kernels: it checks all pointers, shapes, strides and scales.
"""

from __future__ import annotations

import copy
import ctypes
import pickle
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from longlive_serve.backends import device_timer
from longlive_serve.backends.fused import cudnn_builds
from tests.fakes.graphs_on_cpu import Stream

PROPERTIES = '{"deviceName": "a CPU"}'
BYTES = {"fp8": (torch.float8_e4m3fn, 1), "float": (torch.float32, 4), "bf16": (torch.bfloat16, 2)}
KERNELS = {17: 8e-3, 23: 3e-3, 31: 0.0, 46: 9e-3, 47: 0.0}
"""Kernel configurations with their seconds; 31 does not compile, 47 returns zeros."""


class Declared:
    """A tensor of the graph; records its attributes and supports the frontend's setters."""

    def __init__(self, **said: Any) -> None:
        self.said = said
        self.value: Callable[[dict[int, int]], Tensor] = self.at

    def __getattr__(self, name: str) -> Any:
        def say(value: Any) -> Declared:
            self.said[name.removeprefix("set_")] = value
            return self

        return say

    def at(self, pointers: dict[int, int]) -> Tensor:
        dtype, size = BYTES[self.said["data_type"]]
        dim, stride = self.said["dim"], self.said["stride"]
        length = 1 + sum((count - 1) * step for count, step in zip(dim, stride, strict=True))
        memory = (ctypes.c_char * (length * size)).from_address(pointers[self.said["uid"]])
        return torch.frombuffer(memory, dtype=dtype).as_strided(dim, stride)


class Graph:
    built: ClassVar[list[str]] = []
    """Compiled plans, in order."""
    seconds: ClassVar[float] = 0.0
    """Total time of all executed kernels."""
    readable: ClassVar[bool] = True

    stored: ClassVar[list[Graph]] = []
    """Serialized graphs, each with one plan."""

    def __init__(self, **options: Any) -> None:
        assert options.get("handle", "handle") == "handle"
        assert options.get("device_property", PROPERTIES) == PROPERTIES

    def tensor(self, **said: Any) -> Declared:
        return Declared(**said)

    def conv_fprop(self, image: Declared, weight: Declared, **how: Any) -> Declared:
        def products(pointers: dict[int, int]) -> Tensor:
            x, kernel = image.at(pointers).float(), weight.at(pointers).float()
            return torch.nn.functional.conv3d(x, kernel, None, how["stride"], how["padding"], how["dilation"])

        return self._step(products)

    def mul(self, a: Declared, b: Declared, name: str) -> Declared:
        return self._step(lambda pointers: a.value(pointers) * b.at(pointers).float())

    def add(self, a: Declared, b: Declared, name: str) -> Declared:
        return self._step(lambda pointers: a.value(pointers) + b.at(pointers).float())

    def _step(self, value: Callable[[dict[int, int]], Tensor]) -> Declared:
        self.inputs: dict[str, Any] = {}
        self.out = Declared()
        self.out.value = value
        return self.out

    def sdpa_fp8(self, **inputs: Any) -> list[Declared | None]:
        assert inputs["generate_stats"] is False
        self.inputs, self.out, self.largest = inputs, Declared(), [Declared(), Declared()]
        return [self.out, None, *self.largest]

    def validate(self) -> None:
        if self.inputs and self.inputs["q"].said["dim"][3] % 16:
            raise NotSupportedError("head size")

    def build_operation_graph(self) -> None:
        pass

    def create_execution_plans(self, modes: list[str]) -> None:
        assert modes == ["a"]
        self.plans = ["eng2_k24=17", "eng7_k24=0"]

    def check_support(self) -> None:
        pass

    def create_execution_plan(self, backend: int, knobs: dict[str, int]) -> None:
        if knobs["k24"] not in KERNELS:
            raise NotSupportedError("no such kernel")
        self.plans.append(f"eng{backend}_k24={knobs['k24']}")

    def get_execution_plan_count(self) -> int:
        return len(self.plans)

    def get_plan_name_at_index(self, number: int) -> str:
        return self.plans[number]

    def build_plan_at_index(self, number: int) -> None:
        if self.plans[number].endswith("=31"):
            raise NotSupportedError("it does not compile")
        Graph.built.append(self.plans[number])

    def serialize(self) -> list[int]:
        stored = copy.copy(self)
        stored.plans = [Graph.built[-1]]
        Graph.stored.append(stored)
        return list(str(len(Graph.stored) - 1).encode())

    def deserialize(self, handle: str, plan: list[int]) -> None:
        assert handle == "handle"
        if not Graph.readable:
            raise NotSupportedError("another driver")
        self.__dict__.update(vars(Graph.stored[int(bytes(plan))]))

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pointers: dict[int, int], workspace: int, handle: str) -> None:
        self.execute_plan_at_index(pointers, workspace, 0, handle)

    def get_workspace_size_plan_at_index(self, number: int) -> int:
        assert self.plans[number] in Graph.built
        return 0

    def execute_plan_at_index(self, pointers: dict[int, int], workspace: int, number: int, handle: str) -> None:
        kernel = int(self.plans[number].partition("=")[2])
        Graph.seconds += KERNELS.get(kernel, 6e-3)
        assert handle == "handle"
        assert workspace
        self._compute(pointers)
        if kernel == 47:
            self.out.at(pointers).zero_()

    def _compute(self, pointers: dict[int, int]) -> None:
        if not self.inputs:
            self.out.at(pointers).copy_(self.out.value(pointers))
            return
        got = {name: one.at(pointers).float() for name, one in self.inputs.items() if isinstance(one, Declared)}
        q, k, v = (got[name] * got[f"descale_{name}"] for name in "qkv")
        logits = q @ k.transpose(2, 3) * self.inputs["attn_scale"]
        weights = (logits - logits.amax(-1, keepdim=True)).exp()
        small = (weights * got["scale_s"]).to(torch.float8_e4m3fn).float() * got["descale_s"]
        out = small @ v / weights.sum(-1, keepdim=True)
        self.out.at(pointers).copy_((out * got["scale_o"]).clamp(-448, 448))
        for found, x in zip(self.largest, (weights, out), strict=True):
            found.at(pointers).copy_(x.abs().max())


class NotSupportedError(Exception):
    """Like the frontend's, it is not a RuntimeError."""


class Pool:
    """A process pool that runs in this process, which has the fake; checks that arguments can be pickled."""

    def __init__(self, processes: int, context: object) -> None:
        assert processes > 1

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def map(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        return [function(*pickle.loads(pickle.dumps(each))) for each in zip(*arguments, strict=True)]


@pytest.fixture
def cudnn_on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frontend = SimpleNamespace(
        backend_version=lambda: 91900,
        __version__="1.22.0",
        create_device_properties=lambda of: SimpleNamespace(serialize=lambda: PROPERTIES) if of == 0 else of,
        data_type=SimpleNamespace(FP8_E4M3="fp8", FLOAT="float", BFLOAT16="bf16"),
        heur_mode=SimpleNamespace(A="a"),
        knob_type=SimpleNamespace(KERNEL_CFG="k24"),
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        pygraph=Graph,
        cudnnGraphNotSupportedError=NotSupportedError,
    )
    monkeypatch.setitem(sys.modules, "cudnn", frontend)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(cudnn_builds, "ProcessPoolExecutor", Pool)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Graph, "built", [])
    monkeypatch.setattr(device_timer, "time", SimpleNamespace(monotonic=lambda: Graph.seconds))
