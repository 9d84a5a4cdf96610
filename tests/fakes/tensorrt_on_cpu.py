# SPDX-License-Identifier: Apache-2.0
"""A fake of TensorRT's runtime: with it and `cuda_on_cpu.py`, `tensorrt_session.py` runs on the CPU.

An engine is a JSON file with the path of its ONNX graph and its optimization profiles. Executing it runs the graph in
ONNX Runtime on the memory at the given addresses. It checks TensorRT's preconditions, so a wrong address, shape,
profile or stream causes an error or wrong numbers.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import enum
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import pytest

from export.optimization_profiles import profiles_of, shape
from longlive_serve.backends.exported.io_spec import graph_io
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.config.presets import ModelConfig
from longlive_serve.config.serve_config import TENSORRT
from longlive_serve.weights.tensor_files import sha256
from tests.fakes.cuda_on_cpu import CAPABILITY, GPU, Cuda, cuda, cuda_on_cpu

VERSION = "10.16.0"
ACTIVATION_BYTES = 1000
_BOUND = ("tensorrt", "longlive_serve.backends.exported.tensorrt_session", "export.tensorrt_builder")
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


@contextlib.contextmanager
def without_tensorrt() -> Iterator[None]:
    """Unload the modules that import TensorRT; restore them on exit."""
    kept = _forget()
    try:
        yield
    finally:
        _forget()
        for name, module in kept.items():
            sys.modules[name] = module
            package, _, own_name = name.rpartition(".")
            if package:
                setattr(sys.modules[package], own_name, module)


def _forget() -> dict[str, ModuleType]:
    kept = {name: sys.modules.pop(name) for name in _BOUND if name in sys.modules}
    for name in kept:
        package, _, own_name = name.rpartition(".")
        if package:
            delattr(sys.modules[package], own_name)
    return kept


def write_engines(graphs: Path, out: Path, **built: Any) -> Path:
    """Write the output of `export.to_tensorrt` for the folder `graphs`; `built` overrides the build information."""
    manifest = Manifest.read(graphs)
    config = ModelConfig.from_sizes(manifest.sizes)
    table, files = graph_io(config, manifest.variant), {}
    here: dict[str, Any] = {"library": TENSORRT, "tensorrt": VERSION, "weights_mb": None}
    here |= {"gpu": GPU, "compute_capability": "{}.{}".format(*CAPABILITY)}
    out.mkdir(exist_ok=True)
    for name, file in manifest.graphs.items():
        io, engine = table[name], out / f"{name}.engine"
        profiles = [
            {tensor.name: [shape(tensor.shape, sizes, which) for which in range(3)] for tensor in io.inputs}
            for sizes in profiles_of(io, config.window)
        ]
        content = {"graph": str(graphs / file.file), "profiles": profiles, "in_place": dict(io.in_place)}
        engine.write_text(json.dumps(content))
        files[name] = dataclasses.replace(file, file=engine.name, built=here | {"sha256": sha256(engine)} | built)
    dataclasses.replace(manifest, backend=TENSORRT, graphs=files).write(out)
    return out


class Severity(enum.Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Logger:
    Severity: TypeAlias = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Strategy(enum.Enum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class Runtime:
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, engine: bytes) -> Engine | None:
        try:
            return Engine(self.logger, json.loads(engine))
        except ValueError:
            self.logger.log(Severity.ERROR, "magic tag does not match")
            return None


class Engine:
    """`ICudaEngine`."""

    weight_streaming_budget_v2 = 1 << 40

    def __init__(self, logger: Logger, engine: dict[str, Any]) -> None:
        self.logger, self.profiles, self.in_place = logger, engine["profiles"], engine["in_place"]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3  # hide warnings about copied cache writes
        self.session = onnxruntime.InferenceSession(engine["graph"], options)
        self.inputs = {node.name: _DTYPES[node.type] for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]
        self.num_io_tensors, self.num_optimization_profiles = len(self.inputs) + len(self.outputs), len(self.profiles)

    @property
    def device_memory_size_v2(self) -> int:
        return ACTIVATION_BYTES if self.weight_streaming_budget_v2 == 1 << 40 else 2 * ACTIVATION_BYTES

    def get_tensor_name(self, index: int) -> str:
        return [*self.inputs, *self.outputs][index]

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return self.profiles[profile_index][name]

    def create_execution_context(self, strategy: Strategy) -> Context:
        assert strategy is Strategy.USER_MANAGED
        return Context(self)


class Context:
    """`IExecutionContext`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.executed_with: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory = 0

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        self.memory = size
        cuda.blocks.add(memory)

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.profile is not None
        least, _, largest = self.engine.profiles[self.profile][name]
        self.shapes[name] = shape
        return len(shape) == len(least) and all(
            low <= size <= high for low, size, high in zip(least, shape, largest, strict=True)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        if cuda.fails:
            self.engine.logger.log(Severity.ERROR, "an illegal memory access was encountered")
            return False
        addresses, shapes = dict(self.addresses), dict(self.shapes)
        assert stream_handle == cuda.current.cuda_stream != 0, "TensorRT would synchronize with the default stream"
        assert self.memory >= self.engine.device_memory_size_v2
        for output, name in self.engine.in_place.items():
            assert addresses[output] == addresses[name], f"{output}: must be updated in place"

        def execute() -> None:
            _execute(self.engine, shapes, addresses)

        if cuda.capturing is None:
            cuda.executed += 1
            self.executed_with = shapes
            execute()
            return True
        cuda.capturing.work.append(execute)
        return self.executed_with == shapes  # the first call with new shapes cannot be captured


def _execute(engine: Engine, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
    inputs = {name: _memory(addresses[name], shapes[name], dtype) for name, dtype in engine.inputs.items()}
    for name, result in zip(engine.outputs, engine.session.run(None, inputs), strict=True):
        _memory(addresses[name], result.shape, result.dtype)[...] = result


def _memory(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    """The array at an address."""
    count = math.prod(shape) * np.dtype(dtype).itemsize
    memory = memoryview((ctypes.c_byte * count).from_address(address))
    return np.frombuffer(memory, dtype=dtype).reshape(shape)


@contextlib.contextmanager
def tensorrt_on_cpu() -> Iterator[Cuda]:
    """Make `import tensorrt` return the fake; includes `cuda_on_cpu`."""
    module = ModuleType("tensorrt")
    for name, part in {
        "__version__": VERSION,
        "ILogger": Logger,
        "Runtime": Runtime,
        "IExecutionContext": Context,
        "ExecutionContextAllocationStrategy": Strategy,
    }.items():
        setattr(module, name, part)
    with without_tensorrt(), cuda_on_cpu() as state, pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", module)
        yield state
