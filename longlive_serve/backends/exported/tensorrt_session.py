# SPDX-License-Identifier: Apache-2.0
"""Runs TensorRT engines directly on the memory of torch tensors.

There is one execution context per optimization profile. All engines of a process run one after the other on their own
stream and share one block of activation memory. Calls of the DiT repeat with the same addresses, so they are captured
as CUDA graphs. Import this module after `tensorrt_library.use`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import tensorrt as trt
import torch
from torch import Tensor

from longlive_serve.backends.exported.io_spec import GraphIO
from longlive_serve.backends.exported.manifest import GraphFile
from longlive_serve.backends.exported.tensorrt_library import TENSORRT_RTX

log = logging.getLogger(__name__)

CUDA_GRAPHS_KEPT = 64  # per engine: slots times call sizes in use; the least recently used one is evicted


class TensorRTGraph:
    """One engine. A `modules.Graph`."""

    _stream: ClassVar[torch.cuda.Stream | None] = None  # on the default stream TensorRT synchronizes every call
    _activation_bytes: ClassVar[int] = 0  # the maximum over the engines of this process
    _activations: ClassVar[Tensor | None] = None

    def __init__(self, folder: Path, file: GraphFile, io: GraphIO, device: str) -> None:
        """Raises ValueError if the engine was built by another TensorRT or for another GPU."""
        self.io, self.device, self.dtype = io, torch.device(device), getattr(torch, file.dtype)
        self.path = folder / file.file
        check_target(self.path, file.built, get_target(self.device, file.built["library"]))
        self._logger = Logger()
        self._runtime = trt.Runtime(self._logger)
        engine = self._runtime.deserialize_cuda_engine(read_engine(self.path, file.built["sha256"]))
        if engine is None:
            raise ValueError(f"{self.path}: TensorRT cannot load it: {self._logger.last_error}. Build it again")
        self.engine = engine
        self._check_names()
        if file.built["weights_mb"] is not None:  # else all weights are on the GPU
            engine.weight_streaming_budget_v2 = file.built["weights_mb"] << 20
        TensorRTGraph._activation_bytes = max(TensorRTGraph._activation_bytes, engine.device_memory_size_v2)
        self._profiles: dict[tuple[int, ...], int] = {}
        self._contexts: dict[int, tuple[trt.IExecutionContext, Tensor]] = {}
        self._static_inputs: dict[tuple[str, torch.Size], Tensor] = {}
        self._cuda_graphs: OrderedDict[tuple[int, ...], torch.cuda.CUDAGraph | None] = OrderedDict()

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dims = self.io.dims(inputs)
        caller = torch.cuda.current_stream(self.device)
        stream = TensorRTGraph._stream = TensorRTGraph._stream or torch.cuda.Stream(self.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            outputs = self._run(self._profile(dims, inputs), dims, inputs)
        caller.wait_stream(stream)
        return outputs

    def _run(self, profile: int, dims: Mapping[str, int], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = {
            tensor.name: torch.empty(
                [dims[dim] if isinstance(dim, str) else dim for dim in tensor.shape],
                dtype=tensor.torch_dtype(self.dtype),
                device=self.device,
            )
            for tensor in self.io.outputs
            if tensor.name not in self.io.in_place
        }
        if not self.io.persistent:
            self._enqueue(profile, {**inputs, **outputs})
            return outputs
        static_inputs = {name: self._static_input(name, tensor) for name, tensor in {**inputs, **outputs}.items()}
        for name in inputs.keys() - set(self.io.persistent):
            static_inputs[name].copy_(inputs[name])
        self._repeat(profile, static_inputs)
        for name, tensor in outputs.items():
            tensor.copy_(static_inputs[name])
        return outputs

    def _static_input(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor at a fixed address for every call: itself if persistent, else a static tensor per shape."""
        if name in self.io.persistent:
            return tensor
        key = name, tensor.shape
        if key not in self._static_inputs:
            self._static_inputs[key] = torch.empty_like(tensor)
        return self._static_inputs[key]

    def _repeat(self, profile: int, tensors: Mapping[str, Tensor]) -> None:
        """Run on tensors at fixed addresses: enqueue the first two calls, and replay a CUDA graph from the third on."""
        key = (profile, *(tensor.data_ptr() for tensor in tensors.values()))
        known, graph = key in self._cuda_graphs, self._cuda_graphs.get(key)
        if graph is not None:
            graph.replay()
        else:
            self._enqueue(profile, tensors)  # TensorRT's setup for new shapes cannot be captured
        if known and graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._enqueue(profile, tensors)
        self._cuda_graphs[key] = graph
        self._cuda_graphs.move_to_end(key)
        if len(self._cuda_graphs) > CUDA_GRAPHS_KEPT:
            self._cuda_graphs.popitem(last=False)

    def _enqueue(self, profile: int, tensors: Mapping[str, Tensor]) -> None:
        context, accepted = self._context(profile), []
        for tensor in self.io.inputs:
            value = tensors[tensor.name]
            assert value.is_contiguous(), f"{tensor.name}: an engine runs on contiguous tensors"
            assert value.dtype == tensor.torch_dtype(self.dtype), f"{tensor.name}: got {value.dtype}"
            accepted.append(context.set_input_shape(tensor.name, tuple(value.shape)))
            accepted.append(context.set_tensor_address(tensor.name, value.data_ptr()))
        for tensor in self.io.outputs:
            out = tensors[self.io.in_place.get(tensor.name, tensor.name)]
            accepted.append(context.set_tensor_address(tensor.name, out.data_ptr()))
        if not all(accepted) or not context.execute_async_v3(torch.cuda.current_stream(self.device).cuda_stream):
            raise RuntimeError(f"{self.path}: TensorRT failed: {self._logger.last_error}")

    def _profile(self, dims: Mapping[str, int], inputs: Mapping[str, Tensor]) -> int:
        """The index of the optimization profile for these shapes."""
        key = tuple(dims.values())
        if key not in self._profiles:
            profiles = range(self.engine.num_optimization_profiles)
            profile = next((index for index in profiles if self._supports(index, inputs)), None)
            if profile is None:
                raise ValueError(
                    f"{self.path}: got a call with {dict(dims)}, expected one it was built for. Build it again"
                )
            self._profiles[key] = profile
        return self._profiles[key]

    def _supports(self, profile: int, inputs: Mapping[str, Tensor]) -> bool:
        for tensor in self.io.inputs:
            least, _, largest = self.engine.get_tensor_profile_shape(tensor.name, profile)
            sizes = enumerate(inputs[tensor.name].shape)
            if not all(least[axis] <= size <= largest[axis] for axis, size in sizes):
                return False
        return True

    def _context(self, profile: int) -> trt.IExecutionContext:
        if profile not in self._contexts:
            size = TensorRTGraph._activation_bytes
            memory = TensorRTGraph._activations
            if memory is None or len(memory) < size:
                memory = TensorRTGraph._activations = torch.empty(size, dtype=torch.uint8, device=self.device)
            context = self.engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            context.set_device_memory(memory.data_ptr(), len(memory))
            stream = torch.cuda.current_stream(self.device)
            if not context.set_optimization_profile_async(profile, stream.cuda_stream):
                raise RuntimeError(f"{self.path}: TensorRT failed: {self._logger.last_error}")
            stream.synchronize()
            self._contexts[profile] = context, memory
        return self._contexts[profile][0]

    def _check_names(self) -> None:
        names = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        expected = {tensor.name for tensor in (*self.io.inputs, *self.io.outputs)}
        if names != expected:
            raise ValueError(f"{self.path}: got tensors {sorted(names)}, expected {sorted(expected)}. Build it again")


class Logger(trt.ILogger):
    """TensorRT's messages in Python's log."""

    _LEVELS: ClassVar[dict[trt.ILogger.Severity, int]] = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.ERROR,
        trt.ILogger.Severity.ERROR: logging.ERROR,
        trt.ILogger.Severity.WARNING: logging.WARNING,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.last_error = "no error message"
        self._warnings: set[str] = set()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        level = self._LEVELS[severity]
        if level == logging.ERROR:
            self.last_error = msg
        if level == logging.WARNING:
            if msg in self._warnings:
                return  # TensorRT repeats a warning for every layer
            self._warnings.add(msg)
        log.log(level, "TensorRT: %s", msg)


def get_target(device: torch.device, library: str) -> dict[str, str]:
    """The only target an engine runs on. TensorRT for RTX adapts the engine to the GPU when it is loaded."""
    if library == TENSORRT_RTX:
        return {"tensorrt": trt.__version__}
    if not torch.cuda.is_available():
        raise ValueError("got no GPU, expected the GPU that runs the engines: TensorRT needs it to build them")
    major, minor = torch.cuda.get_device_capability(device)
    gpu = torch.cuda.get_device_name(device)
    return {"tensorrt": trt.__version__, "gpu": gpu, "compute_capability": f"{major}.{minor}"}


def check_target(path: Path, built: Mapping[str, Any], here: Mapping[str, str]) -> None:
    """Raises ValueError if an engine was built for another target than `here`."""
    mismatches = [f"{key} {built.get(key)!r}, here {here[key]!r}" for key in here if built.get(key) != here[key]]
    if mismatches:
        raise ValueError(
            f"{path}: was built for another machine: {'; '.join(mismatches)}. "
            "Build it here: python -m export.to_tensorrt"
        )


def read_engine(path: Path, sha256: str) -> bytes:
    """Raises ValueError if the file is missing or is not the engine in the manifest."""
    try:
        engine = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}. Build it: python -m export.to_tensorrt") from None
    if hashlib.sha256(engine).hexdigest() != sha256:
        raise ValueError(f"{path}: is not the engine that the manifest describes. Build it again")
    return engine
