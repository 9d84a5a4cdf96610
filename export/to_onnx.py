# SPDX-License-Identifier: Apache-2.0
"""Exports the models of a serve.toml as ONNX graphs: `python -m export.to_onnx --out graphs/demo`.

Every float32 graph is run in ONNX Runtime and compared with PyTorch in float64. The tolerance is measured as the error
of PyTorch in float32, as it depends on the processor. Graphs in float16 and bfloat16 are the same, strongly typed as
TensorRT requires; they are not run, as ONNX Runtime lacks CPU kernels for some of their operators.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from export.onnx_modules import ExportableGraph, exportable_graphs
from longlive_serve.backends.exported.io_spec import BATCH, FRAMES, USED, GraphTensor
from longlive_serve.backends.exported.manifest import MANIFEST, GraphFile, Manifest, sizes_of
from longlive_serve.backends.exported.onnxruntime_session import OnnxRuntimeGraph
from longlive_serve.backends.float64 import LEAST, Float64, error, max_error
from longlive_serve.config.presets import DIT, MODELS, ModelConfig
from longlive_serve.config.serve_config import AUTO, ONNXRUNTIME, ServeConfig
from longlive_serve.models.quantization.int8_fp8_layers import QuantizedLayer
from longlive_serve.observability.log_setup import at_level
from longlive_serve.replay import ReplayCase, case_model, load_case_tensors
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG
from longlive_serve.weights.loader import ModelLoader

MAX_BATCH = 64  # sessions in one call: a bound for the exporter, without cost
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The models to export."""

    sizes: ModelConfig
    variant: str
    load: Callable[[str, torch.dtype], nn.Module]
    """(name, dtype) -> the model, on the CPU."""
    fingerprint: Callable[[str], str]
    """Name -> fingerprint of the weights."""
    recipe: Callable[[str], str]
    """Name -> quantization recipe, or empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The error of ONNX Runtime's results compared with PyTorch."""

    error: float
    """Largest difference from PyTorch in float64, relative to the largest value. For a graph that rounds to 8 bits: the
    norm of the difference from PyTorch in float32, relative to the norm."""
    tolerance: float
    """Allowed error from float32 rounding on this machine. For a graph that rounds to 8 bits: the error of that
    rounding, as a value halfway between two 8-bit numbers may be rounded either way, which affects all later layers."""

    @property
    def fits(self) -> bool:
        return self.error <= self.tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportResult:
    """A written graph."""

    name: str
    file: GraphFile
    operators: int
    seconds: float
    comparison: Comparison | None
    """None if the graph was not run."""


def source_of_config(config: ServeConfig) -> Source:
    loader = ModelLoader.from_config(config)
    return Source(
        sizes=config.model_config,
        variant=config.variant,
        load=lambda name, dtype: loader.load_model(name, "cpu", dtype),
        fingerprint=loader.fingerprint,
        recipe=loader.recipe,
    )


def source_of_case(path: Path) -> Source:
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    return Source(
        sizes=case.model_config,
        variant=case.variant,
        load=lambda _, dtype: case_model(case, tensors).to(dtype),
        fingerprint=lambda _: path.name,
        recipe=lambda _: "",
    )


def export(source: Source, models: list[str], dtype: str, folder: Path, check: bool) -> Iterator[ExportResult]:
    """Write the graphs of `models` to `folder` and update its manifest after each; its other graphs are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = dict(_existing_graphs(source, folder))
    for name in models:
        model, weights = source.load(name, getattr(torch, dtype)), source.fingerprint(name)
        for graph in exportable_graphs(model, source.sizes, source.variant):
            began = time.monotonic()
            file = GraphFile(
                file=f"{graph.io.name}.onnx", dtype=dtype, weights=weights, quantization=source.recipe(name)
            )
            operators = write_graph(graph, folder / file.file)
            comparison = compare(graph, file, folder) if check and dtype == "float32" else None
            graphs[graph.io.name] = file
            Manifest(
                backend=ONNXRUNTIME,
                sizes=sizes_of(source.sizes),
                variant=source.variant,
                graphs=graphs,
                versions={package: version(package) for package in PACKAGES},
            ).write(folder)
            seconds = time.monotonic() - began
            yield ExportResult(
                name=graph.io.name, file=file, operators=operators, seconds=seconds, comparison=comparison
            )


def _existing_graphs(source: Source, folder: Path) -> dict[str, GraphFile]:
    if not (folder / MANIFEST).exists():
        return {}
    manifest = Manifest.read(folder)
    manifest.check(ONNXRUNTIME, source.sizes, source.variant)
    return manifest.graphs


def write_graph(graph: ExportableGraph, path: Path) -> int:
    """Export one graph to `path` and its weights to `path`.data. Returns the number of operators."""
    window = graph.config.window
    dims = {
        BATCH: torch.export.Dim(BATCH, min=1, max=MAX_BATCH),
        FRAMES: torch.export.Dim(FRAMES, min=window.chunk, max=window.window),
        USED: torch.export.Dim(USED, min=window.chunk, max=window.window),
    }

    def dynamic(tensor: GraphTensor) -> dict[int, Any]:
        return {axis: dims[dim] for axis, dim in enumerate(tensor.shape) if isinstance(dim, str)}

    # All sizes differ: the exporter merges dynamic dims of equal size.
    example = graph.example(batch=2, frames=window.chunk, used=2 * window.chunk)
    # With dynamic shapes, a lookup in PyTorch's fake tensor cache takes longer than to compute the shapes.
    with torch.no_grad(), quiet(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        program = torch.onnx.export(
            Flat(graph.model).eval(),
            tuple(example.values()),
            dynamo=True,
            opset_version=graph.opset,
            input_names=[tensor.name for tensor in graph.io.inputs],
            output_names=[tensor.name for tensor in graph.io.outputs],
            dynamic_shapes={"inputs": tuple(dynamic(tensor) for tensor in graph.io.inputs)},
            verbose=False,
        )
    assert program is not None
    path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    program.save(path, external_data=True)
    return len(program.model.graph)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's warnings about packages and names, which need no action."""
    with warnings.catch_warnings(), at_level("torch.onnx", logging.ERROR):
        warnings.simplefilter("ignore")
        yield


class Flat(nn.Module):
    """Wraps a model with variadic inputs, so that the exporter gets all models' dynamic shapes in the same form."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


def compare(graph: ExportableGraph, file: GraphFile, folder: Path) -> Comparison:
    """The largest error over several sizes, and the largest tolerance."""
    window, runtime = graph.config.window, OnnxRuntimeGraph(folder, file, graph.io, "cpu")
    sizes = [(window.chunk, window.chunk), (window.chunk, window.window), (window.window, window.window)]
    errors, tolerances = [], []
    for batch in (1, 2):
        for frames, used in sizes if FRAMES in graph.io.inputs[0].shape else sizes[:1]:
            inputs = graph.example(batch=batch, frames=frames, used=used, seed=frames + used)
            plain, other = both_of_torch(graph, inputs)
            got = runtime(inputs)
            got |= {output: inputs[name] for output, name in graph.io.in_place.items()}
            for tensor, expected, beside in zip(graph.io.outputs, plain, other, strict=True):
                if graph.rounds:
                    errors.append(distance(got[tensor.name], expected))
                    tolerances.append(distance(beside, expected) + LEAST)
                else:
                    errors.append(error(got[tensor.name], beside))
                    tolerances.append(max_error(expected, beside))
    return Comparison(error=max(errors), tolerance=max(tolerances))


@torch.inference_mode()
def both_of_torch(graph: ExportableGraph, inputs: Mapping[str, Tensor]) -> list[tuple[Tensor, ...]]:
    """A graph's outputs in float32, then in float64 or, for a graph that rounds to 8 bits, without that rounding."""
    made = []
    for beside in (contextlib.nullcontext(), unrounded(graph.model) if graph.rounds else Float64()):
        with beside:
            out = graph.model(*inputs.values())
        made.append(out if isinstance(out, tuple) else (out,))
    return made


@contextlib.contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """Disable the quantization of inputs."""
    scales = {layer: layer.input_scale for layer in model.modules() if isinstance(layer, QuantizedLayer)}
    try:
        for layer in scales:
            layer.input_scale = None
        yield
    finally:
        for layer, scale in scales.items():
            layer.input_scale = scale


def distance(got: Tensor, expected: Tensor) -> float:
    """The norm of the difference divided by the norm of `expected`."""
    return float(torch.linalg.vector_norm(got - expected) / torch.linalg.vector_norm(expected))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m export.to_onnx", description=__doc__)
    what = parser.add_mutually_exclusive_group()
    text = "settings with the preset, weights and variant (default: those of the model repository)"
    what.add_argument("--config", type=Path, metavar="TOML", default=DEFAULT_CONFIG, help=text)
    text = "export the DiT of a known case instead, for `python -m longlive_serve.replay`"
    what.add_argument("--case", type=Path, metavar="CASE.json", help=text)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="its graphs of other models are kept")
    parser.add_argument("--dtype", choices=[name for name in ServeConfig.DTYPES if name != AUTO], default="float32")
    text = "models to export; the text encoder and the VAE may have other dtypes than the DiT (default: all)"
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help=text)
    parser.add_argument("--no-check", action="store_true", help="do not run them in ONNX Runtime (at full size: hours)")
    arguments = parser.parse_args(argv)
    columns = ("graph", "operators", "MB", "seconds", "error", "tolerance")
    table = Table(*columns, title=f"{arguments.out}, {arguments.dtype}")
    failed = False
    try:
        source = (
            source_of_case(arguments.case)
            if arguments.case
            else source_of_config(ServeConfig.from_toml(arguments.config))
        )
        models = [DIT] if arguments.case else arguments.models
        with Console(stderr=True).status("exporting") as status:
            for done in export(source, models, arguments.dtype, arguments.out, not arguments.no_check):
                status.update(f"exported {done.name}")
                failed |= done.comparison is not None and not done.comparison.fits
                table.add_row(*cells(done, arguments.out))
    except ValueError as refusal:
        print(f"to_onnx: {refusal}", file=sys.stderr)
        return 2
    Console().print(table)
    if failed:
        print("to_onnx: a graph differs from PyTorch by more than its tolerance", file=sys.stderr)
    return int(failed)


def cells(done: ExportResult, folder: Path) -> tuple[str, ...]:
    megabytes = sum(file.stat().st_size for file in folder.glob(f"{done.file.file}*")) / 1e6
    found = done.comparison
    compared = (f"{found.error:.1e}", f"{found.tolerance:.1e}") if found else ("not run", "")
    return done.name, str(done.operators), f"{megabytes:.1f}", f"{done.seconds:.1f}", *compared


if __name__ == "__main__":
    sys.exit(main())
