# SPDX-License-Identifier: Apache-2.0
"""FP8 (E4M3) convolutions of the VAE decoder by cuDNN, fused with scale, bias and residual addition.

Used by the fused VAE decoder.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from longlive_serve.backends.fused.cudnn_graphs import Tensors, data_type, fp8_graph
from longlive_serve.backends.fused.cudnn_library import Cudnn
from longlive_serve.models.vae.fused_decoder import LAST, FP8Weights


class ConvTensor(enum.IntEnum):
    """The tensors of the graph."""

    X = 1
    WEIGHT = 2
    SCALE = 3
    BIAS = 4
    ADDED = 5
    OUT = 6


def convolution_graph(cudnn: Any, tensors: Tensors, **kwargs: Any) -> Any:
    """OUT = (X * WEIGHT) SCALE + BIAS (+ ADDED, if given), where * is the convolution over T + 2 frames.

    X [1, C, T + 2, H, W], WEIGHT [C', C, 3, 3, 3], SCALE and BIAS [1, C', 1, 1, 1], ADDED and OUT [1, C', T, H, W].
    """
    graph = fp8_graph(cudnn, **kwargs)
    inputs = {
        tensor_id: graph.tensor(
            uid=tensor_id.value,
            dim=list(tensors[tensor_id].shape),
            stride=list(tensors[tensor_id].stride()),
            data_type=data_type(cudnn, tensors[tensor_id]),
            name=tensor_id.name,
        )
        for tensor_id in ConvTensor
        if tensor_id in tensors and tensor_id != ConvTensor.OUT
    }
    ones = [1, 1, 1]
    y = graph.conv_fprop(
        image=inputs[ConvTensor.X],
        weight=inputs[ConvTensor.WEIGHT],
        padding=[0, 1, 1],
        stride=ones,
        dilation=ones,
        name="products",
    )
    y = graph.mul(a=y, b=inputs[ConvTensor.SCALE], name="scaled")
    y = graph.add(a=y, b=inputs[ConvTensor.BIAS], name="with bias")
    if ConvTensor.ADDED in inputs:
        y = graph.add(a=y, b=inputs[ConvTensor.ADDED], name="sum")
    out = tensors[ConvTensor.OUT]
    y.set_uid(ConvTensor.OUT.value).set_output(True).set_dim(list(out.shape)).set_stride(list(out.stride()))
    y.set_data_type(data_type(cudnn, out))
    return graph


class CudnnConvolution:
    """Convolutions over three frames with FP8 inputs and FP8 weights."""

    def __init__(self) -> None:
        """Raises ImportError without the package."""
        self._cudnn = Cudnn()
        self.record_calls = self._cudnn.record_calls

    def __call__(self, x: Tensor, weights: FP8Weights, dtype: torch.dtype, added: Tensor | None) -> Tensor:
        """x [1, C, T + 2, H, W] -> [1, C', T, H, W] in `dtype`, plus `added`; all tensors are channels last."""
        _, _, frames, height, width = x.shape
        size = (1, len(weights.weight), frames - 2, height, width)
        out = torch.empty(size, dtype=dtype, device=x.device, memory_format=LAST)
        tensors = {
            ConvTensor.X: x,
            ConvTensor.WEIGHT: weights.weight,
            ConvTensor.SCALE: weights.scale,
            ConvTensor.BIAS: weights.bias,
        }
        if added is not None:
            tensors[ConvTensor.ADDED] = added
        outputs, inputs = weights.weight.shape[:2]
        group = f"convolution from {inputs} to {outputs} channels"
        self._cudnn(convolution_graph, tensors | {ConvTensor.OUT: out}, ConvTensor.OUT, group)
        return out
