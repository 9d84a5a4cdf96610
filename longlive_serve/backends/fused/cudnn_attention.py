# SPDX-License-Identifier: Apache-2.0
"""FP8 (E4M3) attention by cuDNN, on Hopper and later.

One of the fused backend's attention kernels. On Hopper the output is FP8 as well; only on Blackwell can it be 16-bit.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from longlive_serve.backends.fused.cudnn_graphs import Tensors, data_type, fp8_graph
from longlive_serve.backends.fused.cudnn_library import Cudnn

SOFTMAX_SCALE = 256.0
"""The softmax weights, at most 1, are multiplied by it to use the range of E4M3."""


class AttentionTensor(enum.IntEnum):
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
    """Attention without a mask: Q and OUT [H, L, d], K and V [H, T, d]; the other tensors are scalars."""
    float32, graph = cudnn.data_type.FLOAT, fp8_graph(cudnn, **kwargs)

    def heads(tensor_id: AttentionTensor) -> Any:
        tensor = tensors[tensor_id]
        return graph.tensor(
            uid=tensor_id.value,
            dim=_shape(tensor),
            stride=_strides(tensor),
            data_type=data_type(cudnn, tensor),
            name=tensor_id.name,
        )

    def number(tensor_id: AttentionTensor) -> Any:
        return graph.tensor(uid=tensor_id.value, dim=[1] * 4, stride=[1] * 4, data_type=float32, name=tensor_id.name)

    result, _, *amax = graph.sdpa_fp8(
        q=heads(AttentionTensor.Q),
        k=heads(AttentionTensor.K),
        v=heads(AttentionTensor.V),
        descale_q=number(AttentionTensor.DESCALE_Q),
        descale_k=number(AttentionTensor.DESCALE_K),
        descale_v=number(AttentionTensor.DESCALE_V),
        scale_s=number(AttentionTensor.SCALE_S),
        descale_s=number(AttentionTensor.DESCALE_S),
        scale_o=number(AttentionTensor.SCALE_O),
        attn_scale=tensors[AttentionTensor.Q].shape[2] ** -0.5,
        generate_stats=False,
        name="attention",
    )
    out = tensors[AttentionTensor.OUT]
    result.set_uid(AttentionTensor.OUT.value).set_output(True).set_dim(_shape(out)).set_stride(_strides(out))
    result.set_data_type(data_type(cudnn, out))
    for tensor_id, found in zip((AttentionTensor.AMAX_S, AttentionTensor.AMAX_O), amax, strict=True):
        found.set_uid(tensor_id.value).set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(float32)
    return graph


class CudnnAttention:
    """As `kernels.attention.attention_fp8`."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError without the package."""
        self._cudnn = Cudnn()
        self.record_calls = self._cudnn.record_calls
        one = torch.ones((), device=device)
        self._scalars = {
            # The output keeps the scale of the values.
            **dict.fromkeys((AttentionTensor.DESCALE_V, AttentionTensor.SCALE_O), one),
            AttentionTensor.SCALE_S: SOFTMAX_SCALE * one,
            AttentionTensor.DESCALE_S: one / SOFTMAX_SCALE,
            **{tensor_id: torch.zeros_like(one) for tensor_id in (AttentionTensor.AMAX_S, AttentionTensor.AMAX_O)},
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
        heads, length, size = q.shape
        out = torch.empty(length, heads * size, dtype=q.dtype, device=q.device)
        tensors = {
            AttentionTensor.Q: q,
            AttentionTensor.K: k,
            AttentionTensor.V: v,
            AttentionTensor.OUT: out.unflatten(1, (heads, size)).transpose(0, 1),
        }
        scalars = {AttentionTensor.DESCALE_Q: scales[0], AttentionTensor.DESCALE_K: scales[1], **self._scalars}
        self._cudnn(attention_graph, tensors | scalars, AttentionTensor.OUT, "attention in FP8")
        return out


def _shape(tensor: Tensor) -> list[int]:
    return [1, *tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [tensor.shape[0] * tensor.stride(0), *tensor.stride()]
