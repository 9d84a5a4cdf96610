# SPDX-License-Identifier: Apache-2.0
"""Runs exported ONNX graphs with ONNX Runtime, on the CPU or on CUDA, directly on the memory of torch tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor

from longlive_serve.backends.exported.io_spec import GraphIO
from longlive_serve.backends.exported.manifest import GraphFile

_ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}  # TensorProto.DataType
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntimeGraph:
    """One graph in an ONNX Runtime session. A `modules.Graph`."""

    def __init__(self, folder: Path, file: GraphFile, io: GraphIO, device: str) -> None:
        """Raises ValueError if the file cannot be loaded or ONNX Runtime has no provider for the device."""
        self.io, self.device, self.dtype = io, torch.device(device), getattr(torch, file.dtype)
        provider = _PROVIDERS.get(self.device.type, "none")
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise ValueError(f"device: got {device!r}, but this ONNX Runtime has {available} only")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: it warns about every cache it did not allocate itself
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning would take cores from torch
        if file.quantization:  # fusions of Q/DQ pairs fail or change the result
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self.session = onnxruntime.InferenceSession(folder / file.file, options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ValueError(f"{folder / file.file}: ONNX Runtime cannot load it: {error}") from None

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dims = self.io.dims(inputs)
        binding = self.session.io_binding()
        for tensor in self.io.inputs:
            binding.bind_input(tensor.name, *self._memory(inputs[tensor.name], tensor.torch_dtype(self.dtype)))
        outputs = {}
        for tensor in self.io.outputs:
            if tensor.name in self.io.in_place:
                out = inputs[self.io.in_place[tensor.name]]
            else:
                shape = [dims[dim] if isinstance(dim, str) else dim for dim in tensor.shape]
                out = torch.empty(shape, dtype=tensor.torch_dtype(self.dtype), device=self.device)
                outputs[tensor.name] = out
            binding.bind_output(tensor.name, *self._memory(out, out.dtype))
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime uses its own stream
        self.session.run_with_iobinding(binding)
        return outputs

    def _memory(self, tensor: Tensor, dtype: torch.dtype) -> tuple[str, int, int, tuple[int, ...], int]:
        assert tensor.is_contiguous(), "a graph runs on contiguous tensors"
        assert tensor.dtype == dtype, f"got {tensor.dtype}, expected {dtype}"
        assert math.prod(tensor.shape) > 0
        kind = self.device.type
        return kind, self.device.index or 0, _ONNX_TYPES[dtype], tuple(tensor.shape), tensor.data_ptr()
