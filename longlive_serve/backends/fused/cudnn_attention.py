# SPDX-License-Identifier: Apache-2.0
"""Attention in FP8 (E4M3) by cuDNN, on Hopper and later.

One of those that the fused backend chooses from. On Hopper the result is FP8 as well; in 16 bits cuDNN writes it on
Blackwell alone.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from longlive_serve.backends.fused.cudnn_graphs import Tensors, data_type, fp8_graph
from longlive_serve.backends.fused.cudnn_library import Cudnn

WEIGHTS = 256.0
"""The softmax's weights, at most 1, are multiplied by it, so that they use the range of E4M3."""


class Part(enum.IntEnum):
    """The tensors of the graph."""

    Q = 1
    K = 2
    V = 3
    OUT = 4
    Q_SCALE = 5
    K_SCALE = 6
    V_SCALE = 7
    WEIGHTS = 8
    WEIGHTS_SCALE = 9
    OUT_SCALE = 10
    LARGEST_WEIGHT = 11
    LARGEST_OUT = 12


def attention_graph(cudnn: Any, tensors: Tensors, **where: Any) -> Any:
    """Attention without a mask: Q and OUT [H, L, d], K and V [H, T, d]; the rest is one number each."""
    wide, graph = cudnn.data_type.FLOAT, fp8_graph(cudnn, **where)

    def heads(part: Part) -> Any:
        given = tensors[part]
        return graph.tensor(
            uid=part.value,
            dim=_shape(given),
            stride=_strides(given),
            data_type=data_type(cudnn, given),
            name=part.name,
        )

    def number(part: Part) -> Any:
        return graph.tensor(uid=part.value, dim=[1] * 4, stride=[1] * 4, data_type=wide, name=part.name)

    result, _, *largest = graph.sdpa_fp8(
        q=heads(Part.Q),
        k=heads(Part.K),
        v=heads(Part.V),
        descale_q=number(Part.Q_SCALE),
        descale_k=number(Part.K_SCALE),
        descale_v=number(Part.V_SCALE),
        scale_s=number(Part.WEIGHTS),
        descale_s=number(Part.WEIGHTS_SCALE),
        scale_o=number(Part.OUT_SCALE),
        attn_scale=tensors[Part.Q].shape[2] ** -0.5,
        generate_stats=False,
        name="attention",
    )
    out = tensors[Part.OUT]
    result.set_uid(Part.OUT.value).set_output(True).set_dim(_shape(out)).set_stride(_strides(out))
    result.set_data_type(data_type(cudnn, out))
    for part, found in zip((Part.LARGEST_WEIGHT, Part.LARGEST_OUT), largest, strict=True):
        found.set_uid(part.value).set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(wide)
    return graph


class CudnnAttention:
    """As `kernels.attention.attention_fp8`."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError without the package."""
        self._cudnn = Cudnn()
        self.noting = self._cudnn.noting
        one = torch.ones((), device=device)
        self._numbers = {
            # Of the values and of the result: the same, whatever it is.
            **dict.fromkeys((Part.V_SCALE, Part.OUT_SCALE), one),
            Part.WEIGHTS: WEIGHTS * one,
            Part.WEIGHTS_SCALE: one / WEIGHTS,
            **{part: torch.zeros_like(one) for part in (Part.LARGEST_WEIGHT, Part.LARGEST_OUT)},
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
        heads, length, size = q.shape
        out = torch.empty(length, heads * size, dtype=q.dtype, device=q.device)
        tensors = {Part.Q: q, Part.K: k, Part.V: v, Part.OUT: out.unflatten(1, (heads, size)).transpose(0, 1)}
        numbers = {Part.Q_SCALE: scales[0], Part.K_SCALE: scales[1], **self._numbers}
        self._cudnn(attention_graph, tensors | numbers, Part.OUT, "attention in FP8")
        return out


def _shape(tensor: Tensor) -> list[int]:
    return [1, *tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [tensor.shape[0] * tensor.stride(0), *tensor.stride()]
