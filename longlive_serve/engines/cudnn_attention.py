# SPDX-License-Identifier: Apache-2.0
"""Attention in FP8 (E4M3) by cuDNN, on Hopper and later.

One of those that the fused engine chooses from. PyTorch brings the library and not the way to it: that is the package
`nvidia-cudnn-frontend`. On Hopper the result is FP8 as well; in 16 bits cuDNN writes it on Blackwell alone.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

WEIGHTS = 256.0
"""The softmax's weights, at most 1, are multiplied by it, so that they use the range of E4M3."""


class Uid(enum.IntEnum):
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


def attention_graph(cudnn: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, **where: Any) -> Any:
    """cuDNN's graph of attention without a mask, for tensors [H, L, d] and [H, T, d] of these shapes and strides.

    `where`: its handle, or the properties of a device that need not be here.
    """
    fp8, wide = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=wide, compute_data_type=wide, **where)

    def heads(uid: Uid, tensor: Tensor) -> Any:
        return graph.tensor(uid=uid.value, dim=_shape(tensor), stride=_strides(tensor), data_type=fp8, name=uid.name)

    def number(uid: Uid) -> Any:
        return graph.tensor(uid=uid.value, dim=[1] * 4, stride=[1] * 4, data_type=wide, name=uid.name)

    result, _, *largest = graph.sdpa_fp8(
        q=heads(Uid.Q, q),
        k=heads(Uid.K, k),
        v=heads(Uid.V, v),
        descale_q=number(Uid.Q_SCALE),
        descale_k=number(Uid.K_SCALE),
        descale_v=number(Uid.V_SCALE),
        scale_s=number(Uid.WEIGHTS),
        descale_s=number(Uid.WEIGHTS_SCALE),
        scale_o=number(Uid.OUT_SCALE),
        attn_scale=q.shape[2] ** -0.5,
        generate_stats=False,
        name="attention",
    )
    result.set_uid(Uid.OUT.value).set_output(True).set_dim(_shape(out)).set_stride(_strides(out)).set_data_type(fp8)
    for uid, found in zip((Uid.LARGEST_WEIGHT, Uid.LARGEST_OUT), largest, strict=True):
        found.set_uid(uid.value).set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(wide)
    return graph


class CudnnAttention:
    """As `kernels.attention.attention_fp8`. A plan is made for each size: call it once before a CUDA graph is
    captured."""

    def __init__(self, device: torch.device) -> None:
        """Raises ImportError without the package."""
        import cudnn

        self._cudnn, self._handle = cudnn, cudnn.create_handle()
        self._plans: dict[tuple[torch.Size | tuple[int, ...], ...], Any] = {}
        one = torch.ones((), device=device)
        self._numbers = {
            # Of the values and of the result: the same, whatever it is.
            **dict.fromkeys((Uid.V_SCALE, Uid.OUT_SCALE), one),
            Uid.WEIGHTS: WEIGHTS * one,
            Uid.WEIGHTS_SCALE: one / WEIGHTS,
            **{uid: torch.zeros_like(one) for uid in (Uid.LARGEST_WEIGHT, Uid.LARGEST_OUT)},
        }

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> Tensor:
        heads, length, size = q.shape
        out = torch.empty(length, heads * size, dtype=q.dtype, device=q.device)
        tensors = {Uid.Q: q, Uid.K: k, Uid.V: v, Uid.OUT: out.unflatten(1, (heads, size)).transpose(0, 1)}
        graph = self._plan(*tensors.values())
        tensors |= {Uid.Q_SCALE: scales[0], Uid.K_SCALE: scales[1], **self._numbers}
        workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=q.device)
        self._cudnn.set_stream(self._handle, torch.cuda.current_stream().cuda_stream)
        pointers = {uid.value: tensor.data_ptr() for uid, tensor in tensors.items()}
        graph.execute(pointers, workspace.data_ptr(), handle=self._handle)
        return out

    def _plan(self, *tensors: Tensor) -> Any:
        """Raises RuntimeError where cuDNN has none."""
        key = tuple(part for tensor in tensors for part in (tensor.shape, tensor.stride()))
        if key not in self._plans:
            graph = attention_graph(self._cudnn, *tensors, handle=self._handle)
            try:
                graph.build([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
            except self._cudnn.cudnnGraphNotSupportedError as error:
                raise RuntimeError(f"cuDNN has no FP8 attention for this here: {error}") from None
            self._plans[key] = graph
        return self._plans[key]


def _shape(tensor: Tensor) -> list[int]:
    return [1, *tensor.shape]


def _strides(tensor: Tensor) -> list[int]:
    return [tensor.shape[0] * tensor.stride(0), *tensor.stride()]
