# SPDX-License-Identifier: Apache-2.0
"""The settings file, and whether the files that it names are there and look whole. None of them is loaded.

Called by the command line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from longlive_serve.backends.exported.manifest import MANIFEST, GraphFile, Manifest
from longlive_serve.config.presets import DIT, MODELS, TINY, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, RANDOM_WEIGHTS, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, CheckResult, size
from longlive_serve.doctor.gpu import Gpu
from longlive_serve.doctor.memory_model import parameters
from longlive_serve.doctor.software import pip_install

LFS_POINTER = b"version https://git-lfs"
FETCH = 'fetch it (docs/weights.md says which layouts there are); weights = "random" needs no files'
FETCH_TINY = 'github.com/madebyollin/taehv has it; decoder = "wan" does without'
MAKE = {
    "graphs": "python -m export.to_onnx --config SETTINGS --out FOLDER makes them",
    "tensorrt_engines": "python -m export.to_tensorrt GRAPHS --out FOLDER makes them",
}


def read(path: Path) -> tuple[ServeConfig | None, CheckResult]:
    try:
        config = ServeConfig.from_toml(path)
    except ValueError as error:
        text = str(error).removeprefix(f"{path}: ")
        explained, example = "longlive_serve/config/serve_config.py", "model_repository/longlive/1/serve.toml"
        action = f"{explained} explains every key; {example} is an example"
        return None, CheckResult(PROBLEM, "settings", text, action)
    text = f"preset {config.preset}, variant {config.variant}, decoder {config.decoder}, {config.slots} slots"
    return config, CheckResult(OK, "settings", text)


def files(config: ServeConfig, choice: Mapping[str, str], gpu: Gpu | None) -> list[CheckResult]:
    """`choice`: the backend of every model; empty where that cannot be told: then all checkpoints are looked for."""
    results = [*_weights(config, {name: choice.get(name, TORCH) for name in MODELS})]
    for backend, key in ((ONNXRUNTIME, "graphs"), (TENSORRT, "tensorrt_engines")):
        if folder := getattr(config, key):
            models = [model for model, used in choice.items() if used == backend]
            wrong = _wrong_graphs(config, backend, Path(folder), models, gpu)
            text = f"{folder}: {wrong or size(_bytes_in(Path(folder)))}"
            level = PROBLEM if models or not choice else NOTE  # a folder that no model runs from is not opened
            results.append(CheckResult(level, key, text, MAKE[key]) if wrong else CheckResult(OK, key, text))
    return results


def _weights(config: ServeConfig, choice: Mapping[str, str]) -> Iterator[CheckResult]:
    folder = Path(config.weights)
    if config.weights == RANDOM_WEIGHTS:
        yield from _random_weights(config)
    elif not folder.is_dir():
        action = 'name the folder of the checkpoints, relative to the settings file; "random" for noise'
        yield CheckResult(PROBLEM, "weights", f"{folder} is not there", action)
    else:
        try:
            yield from _checkpoints(config, choice, folder)
        except ImportError as error:  # of PyTorch or Safetensors, before anything was found
            text = f"{folder}, {size(_bytes_in(folder))}, not looked into ({error})"
            yield CheckResult(NOTE, "weights", text, pip_install("torch"))


def _random_weights(config: ServeConfig) -> Iterator[CheckResult]:
    if config.model_config.text_encoder.vocab_size < 256:  # not even the bytes of a text
        text = f"random, but the words of preset {config.preset} need a tokenizer's files"
        yield CheckResult(PROBLEM, "weights", text, 'weights = "demo", the folder beside the shipped settings')
    else:
        yield CheckResult(NOTE, "weights", "random: the videos are noise", "weights = a folder of checkpoints")


def _checkpoints(config: ServeConfig, choice: Mapping[str, str], folder: Path) -> Iterator[CheckResult]:
    """Of the models that run from checkpoints; and the tokenizer, which all need."""
    from longlive_serve.weights.layouts import QUANTIZED, find, tokenizer_folder
    from longlive_serve.weights.loader import adapters_of

    whole = []
    for model in (model for model, backend in choice.items() if backend in (TORCH, FUSED)):
        name = TINY_DECODER if model == VAE_DECODER and config.decoder == TINY else model
        try:
            file = find(name, config.weights)
            assert file is not None, "the weights are not random"
            total = _checked_bytes(file.path, parameters(config.model_config, name))
            if choice[model] == FUSED and file.kind == QUANTIZED:
                text = f"{file.path} is quantized, which the backend {FUSED} does not take"
                action = f'{model}_backend = "{TORCH}", or plain weights and fp8 = true'
                yield CheckResult(PROBLEM, name, text, action)
            whole.append(f"{file.path.relative_to(folder)} {size(total)}")
            if model == DIT:
                whole += [f"adapter {adapter.path.name}" for adapter in adapters_of(config)]
        except ValueError as error:
            yield CheckResult(PROBLEM, name, str(error), FETCH_TINY if name == TINY_DECODER else FETCH)
    if whole:
        yield CheckResult(OK, "weights", f"{folder}: {', '.join(whole)}")
    if not tokenizer_folder(folder).is_dir():
        yield CheckResult(PROBLEM, "tokenizer", f"{tokenizer_folder(folder)} is not there", FETCH)


def _checked_bytes(path: Path, count: int) -> int:
    """The size of a checkpoint, or of its shards. Raises ValueError for what cannot hold so many parameters."""
    from longlive_serve.weights.tensor_files import files_of

    total = 0
    for part in files_of(path):
        if not part.is_file():
            raise ValueError(f"{part} is not there")
        with part.open("rb") as opened:
            if opened.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ValueError(f"{part} is a pointer of Git LFS and not the file itself: git lfs pull")
        total += part.stat().st_size
    if total < count:  # a byte each, with 8 bits
        raise ValueError(f"{path} has {size(total)}: too small for {count:,} parameters, perhaps half a download")
    return total


def _bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _wrong_graphs(config: ServeConfig, backend: str, folder: Path, models: list[str], gpu: Gpu | None) -> str:
    """What is wrong with a folder of graphs that is to run `models`, seen from outside."""
    if not (folder / MANIFEST).is_file():
        return f"has no {MANIFEST}"
    try:
        manifest = Manifest.read(folder)
        manifest.check(folder, backend, config.model_config, config.variant)
    except ValueError as error:
        return str(error).removeprefix(f"{folder}: ")
    try:
        from longlive_serve.backends.exported.io_spec import GRAPHS_OF
    except ImportError:  # of PyTorch
        return ""
    names = [graph for model in models for graph in GRAPHS_OF[model]]
    if missing := [name for name in names if name not in manifest.graphs]:
        return f"has no graph {', '.join(missing)}"
    wrong = (_wrong_graph(folder, manifest.graphs[name], config.dtype, gpu) for name in names)
    return next(filter(None, wrong), "")


def _wrong_graph(folder: Path, graph: GraphFile, dtype: str, gpu: Gpu | None) -> str:
    if not (folder / graph.file).is_file():
        return f"{graph.file} is not there"
    if dtype not in (AUTO, graph.dtype):
        return f"{graph.file} is in {graph.dtype}, but the settings have dtype {dtype}"
    if gpu is not None and graph.built.get("gpu", gpu.name) != gpu.name:
        return f"{graph.file} was built for {graph.built['gpu']}, and here is {gpu.name}"
    return ""
