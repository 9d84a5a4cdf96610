# SPDX-License-Identifier: Apache-2.0
"""Quantizes the models of a serve.toml: `python -m quantization.quantize --recipe int8 --out weights/int8`.

FOLDER becomes a complete `weights` folder for serve.toml: the quantized checkpoints, copies of all other files, and
quantization.json with the format of every layer. After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.results import Measurement, versions
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import DIT, MODELS, TEXT_ENCODER, TINY_DECODER, VAE_DECODER, WAN
from longlive_serve.config.serve_config import TORCH, ServeConfig
from longlive_serve.config.text_files import read_text
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG
from longlive_serve.weights.layouts import DIFFUSERS, LONGLIVE, QUANTIZED_FILE
from longlive_serve.weights.loader import ModelLoader
from longlive_serve.weights.tensor_files import INDEX, sha256
from quantization import calibration
from quantization.calibration import CalibrationState, calibrate, chunks_of_session, settings_of
from quantization.checkpoint import InputStats, quantized_state, write
from quantization.recipes import RECIPES, Format, combine_recipes, formats_of_layers, owner

RECORD = "quantization.json"
DEFAULT_PROMPTS = Path(__file__).parent / "prompts.txt"
PACKAGES = ("torch", "nvidia-modelopt", "safetensors", "longlive-serve")
ALL_ON_TORCH: dict[str, Any] = {"backend": TORCH, "fp8": False, "decoder": WAN}
ALL_ON_TORCH |= {f"{model}_backend": "" for model in MODELS}
Formats = dict[str, dict[str, Format]]
"""By model, by layer."""


def quantize(
    config: ServeConfig,
    recipes: Sequence[str],
    prompts: list[str],
    out: Path,
    argv: Sequence[str] | None = None,
    on_session: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Calibrate and write the folder. Returns the content of quantization.json.

    `on_session` is called with the number of finished sessions. Raises ValueError for weights that cannot be quantized,
    or if `out` holds a calibration with other settings.
    """
    measurement = Measurement.begin("quantization.quantize", argv)
    formats = combine_recipes(recipes)
    loader = _check(config, formats, prompts, out)
    sources = {model: loader.fingerprint(model) for model in MODELS}
    backends = build_backends(dataclasses.replace(config, **ALL_ON_TORCH, slots=1))
    parts: dict[str, Any] = {TEXT_ENCODER: backends.text_encoder, DIT: backends.dit, VAE_DECODER: backends.vae_decoder}
    models = {name: parts[name].model for name in formats}
    layers: Formats = {}
    unquantized: dict[str, dict[str, str]] = {}
    for name, format in formats.items():
        layers[name], unquantized[name] = formats_of_layers(name, models[name], format)
    state = CalibrationState.load(out / calibration.FILE, settings_of(layers, prompts, sources, config.variant))
    runner = ModelRunner(backends, config.model_config, config.variant)
    input_stats = calibrate(models, layers, runner, prompts, state, on_session)
    record = {
        **dataclasses.asdict(measurement),
        "versions": versions(*PACKAGES),
        "recipe": " ".join(recipes),
        "sources": sources,
        "calibration": {"prompts": prompts, "chunks_of_session": chunks_of_session(runner)},
        "layers": {name: _layer_records(layers[name], input_stats[name]) for name in formats},
        "kept_in_16_bits": unquantized,
    }
    return _write_folder(loader, out, layers, input_stats, record, recipes)


def _check(config: ServeConfig, formats: Mapping[str, Format], prompts: list[str], out: Path) -> ModelLoader:
    loader = ModelLoader.from_config(config)
    if loader.folder is None:
        raise ValueError(f"weights: got {config.weights!r}, expected a folder of checkpoints to quantize")
    folder = loader.folder.path
    for name, file in loader.folder.files.items():
        whole = file.path.parent == folder and not file.path.name.endswith(INDEX)
        if not whole or file.kind in (LONGLIVE, DIFFUSERS) or config.lora:
            raise ValueError(
                f"weights: got the {name} in {file.path}, lora {config.lora!r}, expected a file for each model "
                "and no adapters: run python -m export.convert first, then quantize its output"
            )
    if out.resolve() == folder.resolve():
        raise ValueError(f"out: got {out}, the source folder; expected another one")
    if not prompts:
        raise ValueError("prompts: got none, expected at least one line")
    for name in formats:
        if before := loader.recipe(name):
            raise ValueError(
                f"{folder}: got a {name} quantized by {before!r}, expected an unquantized one: choose another recipe"
            )
    return loader


def _layer_records(layers: Mapping[str, Format], input_stats: Mapping[str, InputStats]) -> dict[str, dict[str, Any]]:
    records: dict[str, dict[str, Any]] = {}
    for layer, format in layers.items():
        records[layer] = {"format": str(format)}
        if layer in input_stats:
            records[layer]["input_amax"] = input_stats[layer].amax.max().item()
        if format.smoothing is not None:
            smoothing = input_stats[layer].smoothing
            assert smoothing is not None
            records[layer]["smoothed_input_amax"] = (input_stats[layer].amax * smoothing).max().item()
            records[layer]["smoothing_range"] = [smoothing.min().item(), smoothing.max().item()]
    return records


def _write_folder(
    loader: ModelLoader,
    out: Path,
    layers: Formats,
    input_stats: Mapping[str, Mapping[str, InputStats]],
    record: dict[str, Any],
    recipes: Sequence[str],
) -> dict[str, Any]:
    assert loader.folder is not None
    source, files = loader.folder, []
    for model in MODELS:
        quantized = QUANTIZED_FILE.format(model)
        if model in layers:
            checkpoint = loader.checkpoint(model)
            assert checkpoint is not None
            state = quantized_state(checkpoint.state(), layers[model], input_stats[model])
            metadata = {"recipe": owner(model, recipes), "source_sha256": record["sources"][model]}
            metadata |= {"date": record["date"], "versions": json.dumps(record["versions"])}
            write(out / quantized, state, metadata)
            files.append(quantized)
        else:
            files.append(source.files[model].path.name)
            shutil.copy2(source.files[model].path, out)
    if (tiny_decoder := source.files[TINY_DECODER].path).exists():
        shutil.copy2(tiny_decoder, out)
    shutil.copytree(source.tokenizer, out / source.tokenizer.relative_to(source.path), dirs_exist_ok=True)
    record["files"] = {name: {"bytes": (out / name).stat().st_size, "sha256": sha256(out / name)} for name in files}
    (out / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def read_prompts(path: Path) -> list[str]:
    """One prompt per line; empty lines and lines that start with # are ignored."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as text: {error}") from None
    return [line for line in lines if line and not line.startswith("#")]


def _parser() -> argparse.ArgumentParser:
    described = "\n".join(
        f"  {name:9} " + ", ".join(f"{model} {format}" for model, format in formats.items())
        for name, formats in RECIPES.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m quantization.quantize",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=f'recipes:\n{described}\n\nthen, in serve.toml: weights = "FOLDER"',
    )
    text = "settings with sizes, weights, variant and device (default: the model repository's)"
    parser.add_argument("--config", type=Path, metavar="TOML", default=DEFAULT_CONFIG, help=text)
    text = "one or more recipes, for different models"
    parser.add_argument("--recipe", nargs="+", metavar="NAME", required=True, help=text)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="output folder; it may exist")
    text = "one session per line, which switches to the next two lines (default: captions of the demo world)"
    parser.add_argument("--prompts", type=Path, metavar="FILE", default=DEFAULT_PROMPTS, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    done = 0
    try:
        prompts = read_prompts(arguments.prompts)
        with Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("calibration sessions", total=len(prompts))

            def recorder(sessions: int) -> None:
                nonlocal done
                done = sessions
                bar.update(task, completed=sessions)

            config = ServeConfig.from_toml(arguments.config)
            record = quantize(config, arguments.recipe, prompts, arguments.out, argv, recorder)
    except ValueError as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"quantize: stopped; {done} sessions are saved, the same command continues", file=sys.stderr)
        return 130
    for name, file in record["files"].items():
        print(f"{file['bytes'] / 1e6:10.1f} MB  {arguments.out / name}")
    print(f'serve it with  weights = "{arguments.out.absolute()}"  in a serve.toml')
    return 0


if __name__ == "__main__":
    sys.exit(main())
