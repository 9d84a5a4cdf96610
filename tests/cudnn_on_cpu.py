# SPDX-License-Identifier: Apache-2.0
"""In place of cuDNN's frontend: a graph of one attention, computed on the CPU at the addresses that it is given.

It does what the documentation says of each number and knows of no kernel: what it shows is that every pointer, shape,
stride and scale goes where it belongs.
"""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

BYTES = {"fp8": (torch.float8_e4m3fn, 1), "float": (torch.float32, 4)}


class Declared:
    """A tensor of the graph: what is said of it, as the frontend lets it be said."""

    def __init__(self, **said: Any) -> None:
        self.said = said

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
    built = 0

    def __init__(self, **options: Any) -> None:
        assert options["handle"] == "handle"

    def tensor(self, **said: Any) -> Declared:
        return Declared(**said)

    def sdpa_fp8(self, **inputs: Any) -> list[Declared | None]:
        assert inputs["generate_stats"] is False
        self.inputs, self.out, self.largest = inputs, Declared(), [Declared(), Declared()]
        return [self.out, None, *self.largest]

    def build(self, _: list[str]) -> None:
        Graph.built += 1
        if self.inputs["q"].said["dim"][3] % 16:
            raise NotSupportedError("head size")

    def get_workspace_size(self) -> int:
        return 0

    def execute(self, pointers: dict[int, int], workspace: int, handle: str) -> None:
        assert handle == "handle"
        assert workspace
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
    """As the frontend's: no RuntimeError."""


@pytest.fixture
def cudnn_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    frontend = SimpleNamespace(
        data_type=SimpleNamespace(FP8_E4M3="fp8", FLOAT="float"),
        heur_mode=SimpleNamespace(A="a", FALLBACK="fallback"),
        create_handle=lambda: "handle",
        set_stream=lambda handle, stream: None,
        pygraph=Graph,
        cudnnGraphNotSupportedError=NotSupportedError,
    )
    monkeypatch.setitem(sys.modules, "cudnn", frontend)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(Graph, "built", 0)
