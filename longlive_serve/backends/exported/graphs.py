# SPDX-License-Identifier: Apache-2.0
"""Loads the graphs of a folder with ONNX Runtime or TensorRT. Called by `build_backends` and by the replay."""

from __future__ import annotations

from longlive_serve.backends.exported.io_spec import GRAPHS_OF, graph_io
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.backends.exported.modules import Graph
from longlive_serve.config.presets import ModelConfig
from longlive_serve.config.serve_config import AUTO, ONNXRUNTIME


def load_graphs(
    model: str, manifest: Manifest, device: str, dtype: str = AUTO, fingerprint: str = ""
) -> dict[str, Graph]:
    """Load the graphs of `model`; returns them by name.

    `dtype`: the required dtype, unless `auto`. `fingerprint`: fingerprint of the required weights, or empty. Raises
    ValueError for missing graphs, and for graphs of another dtype or other weights.
    """
    folder, table = manifest.folder, graph_io(ModelConfig.from_sizes(manifest.sizes), manifest.variant)
    graphs: dict[str, Graph] = {}
    for name in GRAPHS_OF[model]:
        file = manifest.graphs.get(name)
        if file is None or dtype not in (AUTO, file.dtype):
            got = "nothing" if file is None else file.dtype
            raise ValueError(f"{folder}: graph {name}: got {got}, expected it in dtype {dtype!r}. Export it")
        if fingerprint not in ("", file.weights):
            raise ValueError(f"{folder}: graph {name}: was exported from other weights. Export it again")
        if manifest.backend == ONNXRUNTIME:
            from longlive_serve.backends.exported.onnxruntime_session import OnnxRuntimeGraph

            graphs[name] = OnnxRuntimeGraph(folder, file, table[name], device)
        else:
            from longlive_serve.backends.exported import tensorrt_library

            tensorrt_library.use(file.built["library"])
            from longlive_serve.backends.exported.tensorrt_session import TensorRTGraph

            graphs[name] = TensorRTGraph(folder, file, table[name], device)
    return graphs
