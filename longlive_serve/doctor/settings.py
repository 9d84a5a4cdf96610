# SPDX-License-Identifier: Apache-2.0
"""The settings file, and whether the files that it names exist and look complete. No tensor is loaded.

Called by the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.backends.exported.manifest import GraphFile, Manifest
from longlive_serve.config.presets import DIT, MODELS, TINY, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, RANDOM_WEIGHTS, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import ERROR, NOTE, OK, CheckResult, format_bytes
from longlive_serve.doctor.gpu import Gpu
from longlive_serve.doctor.memory_model import num_parameters
from longlive_serve.doctor.software import pip_install

GET_WEIGHTS = 'see the layouts in docs/weights.md; weights = "random" needs no files'
GET_TINY = 'download it from github.com/madebyollin/taehv, or set decoder = "wan"'
EXPORT = {
    "graphs": "python -m export.to_onnx --config SETTINGS --out FOLDER creates them",
    "tensorrt_engines": "python -m export.to_tensorrt GRAPHS --out FOLDER creates them",
}


def read_settings(path: Path) -> tuple[ServeConfig | None, CheckResult]:
    try:
        config = ServeConfig.from_toml(path)
    except ValueError as error:
        message = str(error).removeprefix(f"{path}: ")
        return None, CheckResult(ERROR, "settings", message, "docs/settings.md explains every key")
    message = f"preset {config.preset}, variant {config.variant}, decoder {config.decoder}, {config.slots} slots"
    return config, CheckResult(OK, "settings", message)


def check_files(config: ServeConfig, backends: Mapping[str, str], gpu: Gpu | None) -> list[CheckResult]:
    """`backends`: by model; where it is empty, all checkpoints are checked."""
    results = [*_check_weights(config, {model: backends.get(model, TORCH) for model in MODELS})]
    for backend, key in ((ONNXRUNTIME, "graphs"), (TENSORRT, "tensorrt_engines")):
        if folder := getattr(config, key):
            models = [model for model, name in backends.items() if name == backend]
            error = _graphs_error(config, backend, Path(folder), models, gpu)
            message = f"{folder}: {error or format_bytes(_folder_bytes(Path(folder)))}"
            level = ERROR if models or not backends else NOTE  # the server does not open a folder that no model uses
            results.append(CheckResult(level, key, message, EXPORT[key]) if error else CheckResult(OK, key, message))
    return results


def _check_weights(config: ServeConfig, backends: Mapping[str, str]) -> Iterator[CheckResult]:
    folder = Path(config.weights)
    if config.weights == RANDOM_WEIGHTS:
        if config.model_config.text_encoder.vocab_size < 256:  # the random weights' tokenizer has a token per byte
            message = f"random, but preset {config.preset} needs the files of a tokenizer"
            yield CheckResult(ERROR, "weights", message, 'weights = "demo", the folder beside the shipped settings')
        else:
            yield CheckResult(NOTE, "weights", "random: the videos are noise", "weights = a folder of checkpoints")
    elif not folder.is_dir():
        yield CheckResult(ERROR, "weights", f"{folder} not found", GET_WEIGHTS)
    else:
        try:
            yield from _check_checkpoints(config, backends, folder)
        except ImportError as error:  # of PyTorch or Safetensors, before the first result
            message = f"{folder}, {format_bytes(_folder_bytes(folder))}, not checked ({error})"
            yield CheckResult(NOTE, "weights", message, pip_install("torch"))


def _check_checkpoints(config: ServeConfig, backends: Mapping[str, str], folder: Path) -> Iterator[CheckResult]:
    """Check the checkpoints of the models that run from them, and the tokenizer, which every backend needs."""
    from longlive_serve.weights.layouts import QUANTIZED, WeightsFolder
    from longlive_serve.weights.loader import get_adapters

    weights, files = WeightsFolder.resolve(config.weights), []
    assert weights is not None, "the weights are not random"
    for model in (model for model, backend in backends.items() if backend in (TORCH, FUSED)):
        name = TINY_DECODER if model == VAE_DECODER and config.decoder == TINY else model
        try:
            file = weights.files[name]
            size = _checkpoint_bytes(file.path, num_parameters(config.model_config, name))
            if backends[model] == FUSED and file.kind == QUANTIZED:
                message = f"{file.path} is quantized, which the backend {FUSED} does not support"
                action = f'{model}_backend = "{TORCH}", or plain weights and fp8 = true'
                yield CheckResult(ERROR, name, message, action)
            files.append(f"{file.path.relative_to(folder)} {format_bytes(size)}")
            if model == DIT:
                files += [f"adapter {adapter.path.name}" for adapter in get_adapters(weights, config.lora)]
        except ValueError as error:
            yield CheckResult(ERROR, name, str(error), GET_TINY if name == TINY_DECODER else GET_WEIGHTS)
    if files:
        yield CheckResult(OK, "weights", f"{folder}: {', '.join(files)}")
    if not weights.tokenizer.is_dir():
        yield CheckResult(ERROR, "tokenizer", f"{weights.tokenizer} not found", GET_WEIGHTS)


def _checkpoint_bytes(path: Path, num_parameters: int) -> int:
    """The size of a checkpoint with all its shards. Raises ValueError where it is too small for the parameters."""
    from longlive_serve.weights.tensor_files import files_of

    size = 0
    for file in files_of(path):
        if not file.is_file():
            raise ValueError(f"{file} not found")
        size += file.stat().st_size
    if size < num_parameters:  # 8-bit weights have a byte per parameter
        raise ValueError(
            f"{path}: got {format_bytes(size)}, expected {num_parameters:,} parameters; perhaps an incomplete "
            "download, or a pointer of Git LFS (git lfs pull)"
        )
    return size


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _graphs_error(config: ServeConfig, backend: str, folder: Path, models: list[str], gpu: Gpu | None) -> str:
    """Why `models` cannot run from a folder of graphs or engines, as far as its manifest says; empty: they can."""
    try:
        manifest = Manifest.read(folder)
        manifest.check(backend, config.model_config, config.variant)
        from longlive_serve.backends.exported.io_spec import GRAPHS_OF
    except ValueError as error:
        return str(error).removeprefix(f"{folder}: ")
    except ImportError:  # of PyTorch
        return ""
    names = [graph for model in models for graph in GRAPHS_OF[model]]
    if missing := [name for name in names if name not in manifest.graphs]:
        return f"has no graph {', '.join(missing)}"
    errors = (_graph_error(folder, manifest.graphs[name], config.dtype, gpu) for name in names)
    return next(filter(None, errors), "")


def _graph_error(folder: Path, graph: GraphFile, dtype: str, gpu: Gpu | None) -> str:
    if not (folder / graph.file).is_file():
        return f"{graph.file} not found"
    if dtype not in (AUTO, graph.dtype):
        return f"{graph.file} is in {graph.dtype}, but the settings have dtype {dtype}"
    if gpu is not None and graph.built.get("gpu", gpu.name) != gpu.name:
        return f"{graph.file} was built for {graph.built['gpu']}, but the GPU is {gpu.name}"
    return ""
