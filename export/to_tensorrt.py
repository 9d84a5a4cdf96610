# SPDX-License-Identifier: Apache-2.0
"""Builds TensorRT engines from exported graphs, on the GPU that runs them: `python -m export.to_tensorrt graphs/bf16`.

TensorRT 10.16 and 11, and TensorRT for RTX (`--library tensorrt_rtx`, consumer GPUs; it builds without a GPU as well).
An existing engine is reused if it was built from the same graph by the same TensorRT for the same GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from longlive_serve.backends.exported.io_spec import graph_io
from longlive_serve.backends.exported.manifest import MANIFEST, GraphFile, Manifest
from longlive_serve.backends.exported.tensorrt_library import LIBRARIES, TENSORRT, use
from longlive_serve.config import serve_config
from longlive_serve.config.presets import ModelConfig
from longlive_serve.weights.tensor_files import sha256

if TYPE_CHECKING:
    from export.tensorrt_builder import Options

TIMING_CACHE = "timing.cache"  # TensorRT's, in the folder of engines


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineBuild:
    """The result for one graph."""

    name: str
    file: GraphFile
    profiles: int
    seconds: float
    reused: bool


def build(
    source: Path, out: Path, graphs: list[str], library: str, options: Options, progress: Progress
) -> Iterator[EngineBuild]:
    """Build engines of `graphs` (if empty, of all graphs in `source`) in `out` and update its manifest after each.

    Raises ValueError for folders that do not match, and for a graph that TensorRT does not support.
    """
    from export.optimization_profiles import profiles_of
    from export.tensorrt_builder import build_engine
    from longlive_serve.backends.exported.tensorrt_session import get_target

    given = _read_graphs(source, graphs)
    sizes = ModelConfig.from_sizes(given.sizes)
    here = {"library": library, **get_target(torch.device("cuda"), library), **dataclasses.asdict(options)}
    made = _existing_engines(out, given, sizes)
    made.versions[library] = here["tensorrt"]
    timing_cache = out / TIMING_CACHE if library == TENSORRT else None
    for name, io in graph_io(sizes, given.variant).items():
        if name not in (graphs or given.graphs):
            continue
        began, graph, profiles = time.monotonic(), given.graphs[name], profiles_of(io, sizes.window, options.max_batch)
        of_profiles = [{dim: list(three) for dim, three in profile.items()} for profile in profiles]
        build_info = here | {"graph": _hash_of(source / graph.file), "profiles": of_profiles}
        reused = _is_built(out, made.graphs.get(name), build_info)
        if not reused:
            task = progress.add_task(name, total=None)
            engine = build_engine(source / graph.file, io, profiles, options, timing_cache, progress)
            progress.remove_task(task)
            made.graphs[name] = _write(engine, out / f"{name}.engine", graph, build_info)
            made.write(out)
        seconds = time.monotonic() - began
        yield EngineBuild(name=name, file=made.graphs[name], profiles=len(profiles), seconds=seconds, reused=reused)


def _read_graphs(source: Path, wanted: list[str]) -> Manifest:
    manifest = Manifest.read(source)
    if manifest.backend != serve_config.ONNXRUNTIME:
        raise ValueError(f"{source}: got {manifest.backend} engines, expected graphs of `python -m export.to_onnx`")
    if unknown := sorted(set(wanted) - manifest.graphs.keys()):
        raise ValueError(f"{source}: got no graphs {unknown} in it, expected some of {sorted(manifest.graphs)}")
    return manifest


def _existing_engines(out: Path, given: Manifest, sizes: ModelConfig) -> Manifest:
    """The manifest of `out`, or one without engines if there is none."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / MANIFEST).exists():
        return dataclasses.replace(given, backend=serve_config.TENSORRT, graphs={}, versions=dict(given.versions))
    made = Manifest.read(out)
    made.check(serve_config.TENSORRT, sizes, given.variant)
    made.versions.update(given.versions)
    return made


def _is_built(out: Path, file: GraphFile | None, build_info: dict[str, Any]) -> bool:
    if file is None or not (out / file.file).exists():
        return False
    return file.built == build_info | {"sha256": sha256(out / file.file)}


def _write(engine: memoryview, path: Path, graph: GraphFile, build_info: dict[str, Any]) -> GraphFile:
    path.write_bytes(engine)
    return dataclasses.replace(graph, file=path.name, built=build_info | {"sha256": sha256(path)})


def _hash_of(path: Path) -> str:
    """Hash of a graph and its weights."""
    data = path.with_name(f"{path.name}.data")
    return sha256(path) + (sha256(data) if data.exists() else "")


def main() -> int:
    arguments = _arguments()
    table = Table("graph", "engine, MB", "profiles", "seconds", "")
    try:
        use(arguments.library)
        from export.tensorrt_builder import Options

        options = Options(
            max_batch=arguments.max_batch,
            workspace_mb=arguments.workspace_mb,
            weights_mb=arguments.weights_mb,
            optimization_level=arguments.optimization_level,
        )
        with Progress(console=Console(stderr=True), transient=True) as progress:
            for result in build(arguments.graphs, arguments.out, arguments.only, arguments.library, options, progress):
                megabytes = (arguments.out / result.file.file).stat().st_size / 1e6
                reused = "reused" if result.reused else ""
                table.add_row(result.name, f"{megabytes:.1f}", str(result.profiles), f"{result.seconds:.1f}", reused)
    except ValueError as error:
        print(f"to_tensorrt: {error}", file=sys.stderr)
        return 2
    finally:
        if table.rows:
            Console().print(table)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m export.to_tensorrt", description=__doc__)
    parser.add_argument("graphs", type=Path, metavar="FOLDER", help="made by `python -m export.to_onnx`")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="`tensorrt_engines` in serve.toml")
    parser.add_argument("--only", nargs="+", metavar="GRAPH", default=[], help="build these graphs (default: all)")
    parser.add_argument("--library", choices=LIBRARIES, default=TENSORRT)
    parser.add_argument("--max-batch", type=int, default=1, help="sessions in one call (default: %(default)s)")
    parser.add_argument("--workspace-mb", type=int, help="workspace memory of a kernel (default: all)")
    text = "GPU memory for weights; the rest is streamed from host memory, which is slower (default: all)"
    parser.add_argument("--weights-mb", type=int, help=text)
    text = "0: fastest build, 5: longest search (default: TensorRT's)"
    parser.add_argument("--optimization-level", type=int, choices=range(6), help=text)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
