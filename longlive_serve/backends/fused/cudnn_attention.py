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

SOFTMAX_SCALE = 256.0
"""The softmax's weights, at most 1, are multiplied by it, so that they use the range of E4M3."""


class Part(enum.IntEnum):
    """The tensors of the graph."""

    Q = 1
    K = 2
    V = 3
    OUT = 4
    DESCALE_Q = 5
    DESCALE_K = 6
    DESCALE_V = 7
    SCALE_S = 8
    DESCALE_S = 9
    SCALE_O = 10
    AMAX_S = 11
    AMAX_O = 12


def attention_graph(cudnn: Any, tensors: Tensors, **kwargs: Any) -> Any:
    """Attention without a mask: Q and OUT [H, L, d], K and V [H, T, d]; the rest is one number each."""
    float32, graph = cudnn.data_type.FLOAT, fp8_graph(cudnn, **kwargs)

    def heads(part: Part) -> Any:
        tensor = tensors[part]
        return graph.tensor(
            uid=part.value,
            dim=_shape(tensor),
            stride=_strides(tensor),
            data_type=data_type(cudnn, tensor),
            name=part.name,
        )

    def number(part: Part) -> Any:
        return graph.tensor(uid=part.value, dim=[1] * 4, stride=[1] * 4, data_type=float32, name=part.name)

    result, _, *amax = graph.sdpa_fp8(
        q=heads(Part.Q),
        k=heads(Part.K),
        v=heads(Part.V),
        descale_q=number(Part.DESCALE_Q),
        descale_k=number(Part.DESCALE_K),
        descale_v=number(Part.DESCALE_V),
        scale_s=number(Part.SCALE_S),
        descale_s=number(Part.DESCALE_S),
        scale_o=number(Part.SCALE_O),
        attn_scale=tensors[Part.Q].shape[2] ** -0.5,
        generate_stats=False,
        name="attention",
    )
    out = tensors[Part.OUT]
    result.set_uid(Part.OUT.value).set_output(True).set_dim(_shape(out)).set_stride(_strides(out))
    result.set_data_type(data_type(cudnn, out))
    for part, found in zip((Part.AMAX_S, Part.AMAX_O), amax, strict=True):
        found.set_uid(part.value).set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
    return graph


class CudnnAttention:
    """As `kernels.attention.attention_fp8`."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError without the package."""
        self._cudnn = Cudnn()
        self.record_calls = self._cudnn.record_calls
        one = torch.ones((), device=device)
        self._scalars = {
            # Of the values and of the result: the same, whatever it is.
            **dict.fromkeys((Part.DESCALE_V, Part.SCALE_O), one),
            Part.SCALE_S: SOFTMAX_SCALE * one,
            Part.DESCALE_S: one / SOFTMAX_SCALE,
            **{part: torch.zeros_like(one) for part in (Part.AMAX_S, Part.AMAX_O)},
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
        heads, length, size = q.shape
        out = torch.empty(length, heads * size, dtype=q.dtype, device=q.device)
        tensors = {Part.Q: q, Part.K: k, Part.V: v, Part.OUT: out.unflatten(1, (heads, size)).transpose(0, 1)}
        scalars = {Part.DESCALE_Q: scales[0], Part.DESCALE_K: scales[1], **self._scalars}
        self._cudnn(attention_graph, tensors | scalars, Part.OUT, "attention in FP8")
        return out


def _shape(tensor: Tensor) -> list[int]:
    return [1, *tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [tensor.shape[0] * tensor.stride(0), *tensor.stride()]
