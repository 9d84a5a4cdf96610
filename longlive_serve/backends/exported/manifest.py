# SPDX-License-Identifier: Apache-2.0
"""The `manifest.json` of a folder of exported graphs: their sources, sizes and targets.

Written by `export/`, read by `build_backends`, which rejects graphs of other sizes than the served model's.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from longlive_serve.config.presets import ModelConfig

MANIFEST = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphFile:
    """One graph of a folder."""

    file: str
    dtype: str
    """Dtype of the weights: float32, float16 or bfloat16."""
    quantization: str = ""
    """The recipe, if some of its weights are quantized."""
    weights: str = ""
    """SHA-256 of the checkpoint it was exported from; `random` for random weights."""
    built: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of a TensorRT engine: its build options and target (`tensorrt_session.check_target`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of a folder."""

    backend: str
    """The backend that runs the files: `onnxruntime` or `tensorrt`."""
    sizes: dict[str, Any]
    """The model configuration, as returned by `sizes_of`."""
    variant: str
    graphs: dict[str, GraphFile]
    versions: dict[str, str]
    format: int = FORMAT
    folder: Path = Path()
    """The folder it was read from."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ValueError with the reason if the folder has no valid manifest."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"got format {values['format']}, expected {FORMAT}: export the graphs again")
            graphs = {name: GraphFile(**graph) for name, graph in values.pop("graphs").items()}
            return cls(**values, graphs=graphs, folder=folder)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: not a manifest of graphs ({type(error).__name__}: {error}); "
                "`python -m export.to_onnx` and `python -m export.to_tensorrt` create such folders"
            ) from None

    def write(self, folder: Path) -> None:
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "folder"}
        (folder / MANIFEST).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def check(self, backend: str, config: ModelConfig, variant: str) -> None:
        """Raises ValueError if the graphs are of another backend, other sizes or another variant."""
        expected = sizes_of(config)
        wrong = [
            f"{key} {self.sizes.get(key)!r} instead of {expected[key]!r}"
            for key in expected
            if self.sizes.get(key) != expected[key]
        ]
        if self.backend != backend:
            wrong.append(f"backend {self.backend!r} instead of {backend!r}")
        if self.variant != variant:
            wrong.append(f"variant {self.variant!r} instead of {variant!r}")
        if wrong:
            raise ValueError(f"{self.folder}: graphs of another LongLive: {'; '.join(wrong)}. Export them again")


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """The sizes of the models that can be exported, as they come back from JSON."""
    sizes: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    del sizes["tiny_decoder"]
    return sizes
