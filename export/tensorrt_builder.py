# SPDX-License-Identifier: Apache-2.0
"""Builds a TensorRT engine from an ONNX graph. Import it after `tensorrt_library.use`; the import needs no GPU.

It uses only the API that TensorRT 10.16, TensorRT 11 and TensorRT for RTX share, which
`tests/project/tensorrt_types.py` checks. Networks are strongly typed: an engine computes in the dtypes of the graph.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import SupportsInt

import tensorrt as trt
from rich.progress import Progress, TaskID

from export.optimization_profiles import Sizes, shape
from longlive_serve.backends.exported.io_spec import GraphIO
from longlive_serve.backends.exported.tensorrt_session import Logger


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Build options of engines."""

    max_batch: int = 1
    """Sessions in one call; the engine runs one at a time."""
    workspace_mb: int | None = None
    """Workspace memory of a kernel; None: no limit."""
    weights_mb: int | None = None
    """GPU memory for weights; the rest stays in host memory and is fetched in every run, which is slower. None: all
    weights are on the GPU."""
    optimization_level: int | None = None
    """0 (fast build) to 5; None: TensorRT's default."""


def build_engine(
    path: Path, io: GraphIO, profiles: list[Sizes], options: Options, timing_cache: Path | None, progress: Progress
) -> memoryview:
    """Build the engine of the graph in `path`. Raises ValueError with the node and TensorRT's error.

    timing_cache: TensorRT's file of kernel timings, read and updated to speed up later builds; None for a library that
    does not time kernels during the build.
    """
    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        raise ValueError(f"{path}: TensorRT cannot read it:\n  {parser_errors(parser)}")
    config = builder.create_builder_config()
    config.progress_monitor = monitor = Monitor(progress)
    apply(options, config)
    for sizes in profiles:
        if config.add_optimization_profile(optimization_profile(builder, io, sizes)) < 0:
            raise ValueError(f"{path}: TensorRT does not accept the sizes {sizes}: {logger.last_error}")
    timings = None if timing_cache is None else timings_of(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    monitor.clear()
    if engine is None:
        raise ValueError(f"{path}: TensorRT cannot build it: {logger.last_error}")
    if timing_cache is not None and timings is not None:
        timing_cache.write_bytes(memoryview(timings.serialize()))
    return memoryview(engine)


def apply(options: Options, config: trt.IBuilderConfig) -> None:
    if options.workspace_mb is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.weights_mb is not None:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def optimization_profile(builder: trt.Builder, io: GraphIO, sizes: Sizes) -> trt.IOptimizationProfile:
    profile = builder.create_optimization_profile()
    for tensor in io.inputs:
        smallest, optimal, largest = (trt.Dims(shape(tensor.shape, sizes, which)) for which in range(3))
        profile.set_shape(tensor.name, smallest, optimal, largest)
    return profile


def timings_of(config: trt.IBuilderConfig, path: Path) -> trt.ITimingCache:
    """The timing cache in the file `path`, or an empty one if the file is of another GPU or TensorRT."""
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def parser_errors(parser: trt.OnnxParser) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    return "\n  ".join(f"{error.node_name()} ({error.node_operator()}): {error.desc()}" for error in errors)


class Monitor(trt.IProgressMonitor):
    """TensorRT's phases as progress bars."""

    def __init__(self, progress: Progress) -> None:
        trt.IProgressMonitor.__init__(self)
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def phase_start(self, phase_name: str, parent_phase: str, num_steps: SupportsInt) -> None:
        self._tasks[phase_name] = self._progress.add_task(phase_name, total=int(num_steps))

    def step_complete(self, phase_name: str, step: SupportsInt) -> bool:
        self._progress.update(self._tasks[phase_name], completed=int(step) + 1)
        return True  # False would end the build

    def phase_finish(self, phase_name: str) -> None:
        self._progress.remove_task(self._tasks.pop(phase_name))

    def clear(self) -> None:
        """Remove the bars of phases left unfinished by an error."""
        for phase_name in list(self._tasks):
            self.phase_finish(phase_name)
