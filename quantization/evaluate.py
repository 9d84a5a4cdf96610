# SPDX-License-Identifier: Apache-2.0
"""Evaluates the recipes: `python -m quantization.evaluate --json results/quantization.json --plot PNG`.

Quantizes the demo model with every recipe and compares it with the unquantized one: bytes, errors of single forwards
and of whole videos, and the attributes that an exact reader finds in the frames. Also measures full-size files.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from benchmarks.results import SERVER, Measurement, cpu, read_results, versions
from longlive_serve.config.presets import DIT, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.protocol.session_options import RECACHE
from quantization.dynamic_fp8 import simulate, simulate_attention, simulate_decoder
from quantization.flow_errors import flow_errors
from quantization.quantize import DEFAULT_PROMPTS, quantize, read_prompts
from quantization.recipes import RECIPES
from quantization.report import UNQUANTIZED, markdown, plot
from quantization.rollouts import GROWTH_BOUND, STD_BOUNDS, Rollout, compare, roll_out
from quantization.sizes import FULL_SIZE, full_size_bytes, sizes
from training.quality.__main__ import SHIPPED
from training.quality.measures import attribute_accuracy, held_out_captions, switching
from training.quality.workers import Workers

PACKAGES = ("torch", "nvidia-modelopt", "safetensors")
CODE = (
    *SERVER,
    "quantization",
    "training/quality",
    "training/world.py",
    "training/latents.py",
)
SESSIONS_OF_FLOW = 4
FUSED: dict[str, tuple[Callable[[ModelRunner], None], dict[str, str]]] = {
    "fused fp8": (simulate, {DIT: "FP8 (E4M3): a scale for every token, one for every output channel"}),
    "fused fp8 attention": (
        simulate_attention,
        {DIT: "the same; queries, keys, values and the KV cache with a scale for every layer"},
    ),
    "fused fp8 decoder": (
        simulate_decoder,
        {VAE_DECODER: "FP8 (E4M3): a scale for every layer, one for every output channel"},
    ),
}
"""Settings of the backend `fused` instead of recipes: `fp8`, `fp8` with `fp8_attention`, `fp8_decoder`. The function
simulates them in a PyTorch model runner; the dict describes the formats."""
COLUMNS = (*RECIPES, *FUSED)
MEASURED_AT_FULL_SIZE = (DIT, VAE_DECODER)


def quantize_all(config: ServeConfig, recipes: Sequence[str], folder: Path) -> dict[str, str]:
    """Quantize the demo model with every recipe. Returns the weights folders by recipe."""
    prompts = read_prompts(DEFAULT_PROMPTS)
    with Progress(console=Console(stderr=True)) as bar:
        for recipe in recipes:
            task = bar.add_task(f"calibrating {recipe}", total=len(prompts))

            def recorder(sessions: int, task: TaskID = task) -> None:
                bar.update(task, completed=sessions)

            quantize(config, [recipe], prompts, folder / recipe, on_session=recorder)
    return {recipe: str(folder / recipe) for recipe in recipes}


def full_size_ratios(folder: Path) -> dict[str, dict[str, Any]]:
    """By recipe: bytes of the full-size checkpoint (the DiT's if it is quantized) relative to bfloat16."""
    found: dict[str, dict[str, Any]] = {}
    for model in MEASURED_AT_FULL_SIZE:
        formats = {name: recipe[model] for name, recipe in RECIPES.items() if model in recipe and name not in found}
        num_bytes = full_size_bytes(model, formats, folder)
        for name in formats:
            found[name] = {
                "bytes_ratio": num_bytes[name] / num_bytes["bfloat16"],
                "bytes_ratio_of": f"{model} of {FULL_SIZE}: checkpoint file, against the same in bfloat16",
                "full_size_bytes": {"bfloat16": num_bytes["bfloat16"], "quantized": num_bytes[name]},
            }
    return found


def quality(workers: Workers, captions: int, switches: int) -> dict[str, Any]:
    """Quality of the videos, as in `training.quality`."""
    by = attribute_accuracy(workers, captions)
    switched = switching(workers, switches, RECACHE)
    return {
        "attribute_accuracy": min(by["chunks_1_2"], by["chunks_8_9"]),
        "attribute_accuracy_by": by,
        "switch_adoption_within_2_chunks": switched["adoption"],
        "switch_kept_attributes": switched["kept"],
        "switch_flicker": switched["flicker"],
    }


def of_recipe(config: ServeConfig, name: str, folder: str) -> dict[str, Any]:
    """Formats and sizes of a recipe."""
    found = sizes(config.model_config, folder)
    plain = sizes(config.model_config, config.weights)["bytes_in_memory"]  # in bfloat16
    model = next(model for model in MEASURED_AT_FULL_SIZE if model in RECIPES[name])
    return {
        "formats": {model: str(format) for model, format in RECIPES[name].items()},
        "bytes_ratio_demo": found["bytes_on_disk"][model] / plain[model],
        **found,
    }


def measure(record: dict[str, Any], weights: Path, folder: Path, counts: argparse.Namespace) -> Iterator[None]:
    """Fill `record`; yields after each part."""
    config = ServeConfig(preset="demo", weights=str(weights), backend="torch", device="cpu", slots=1)
    folders = quantize_all(config, [name for name in counts.columns if name in RECIPES], folder)
    record[UNQUANTIZED] = record.get(UNQUANTIZED, {}) | sizes(config.model_config, config.weights)
    recipes = record.setdefault("recipes", {})
    if folders:
        measure_recipes(config, folders, recipes, folder)
    for name in (name for name in FUSED if name in counts.columns):
        recipes[name] = {"formats": FUSED[name][1]}
        folders[name] = config.weights
    yield
    cases = held_out_captions(counts.rollouts, seed=5)
    expected: list[Rollout] = []
    for name, path in {UNQUANTIZED: config.weights, **folders}.items():
        print(name, file=sys.stderr)
        results = record[UNQUANTIZED] if name == UNQUANTIZED else recipes[name]
        with Workers(Path(path), FUSED[name][0] if name in FUSED else None) as workers:
            rollouts = workers.map("videos of 60 s", roll_out, cases)
            compared = compare(rollouts, expected or rollouts, cases)
            if name == UNQUANTIZED:
                expected, compared = rollouts, {key: compared[key] for key in ("attributes_right_at_60s",)}
            results |= compared
            if name != UNQUANTIZED or "attribute_accuracy" not in results:  # reuse an earlier run with the same counts
                results |= quality(workers, counts.captions, counts.switches)
        for key in ("attribute_accuracy", "switch_adoption_within_2_chunks"):
            if name != UNQUANTIZED:
                results[f"{key}_lost"] = record[UNQUANTIZED][key] - results[key]
        yield


def measure_recipes(config: ServeConfig, folders: dict[str, str], recipes: dict[str, Any], folder: Path) -> None:
    """Measure sizes and errors of single forwards."""
    ratios = full_size_ratios(folder)
    recipes |= {name: ratios[name] | of_recipe(config, name, path) for name, path in folders.items()}
    of_dit = {name: path for name, path in folders.items() if DIT in RECIPES[name]}
    for name, results in flow_errors(config, of_dit, read_prompts(DEFAULT_PROMPTS), SESSIONS_OF_FLOW).items():
        recipes[name] |= results


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quantization.evaluate", description=__doc__)
    text = "weights of the demo model (default: the shipped weights)"
    parser.add_argument("--weights", type=Path, metavar="FOLDER", default=SHIPPED, help=text)
    text = "keep the quantized weights here and continue calibrations in it (default: a temporary folder)"
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--json", type=Path, metavar="JSON", help="write the results to this file, after each part")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot the errors over depth and time")
    text = "measure only these; keep the other columns of --json (default: all)"
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="NAME", help=text)
    text = "measure nothing: print a results file as Markdown (with --plot, plot it too)"
    parser.add_argument("--table", type=Path, metavar="JSON", help=text)
    for name, count in {"captions": 200, "switches": 100, "rollouts": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=count, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.table is not None:
        record = read_results(arguments.table)
    else:
        record = _measure_and_write(arguments, Measurement.begin("quantization.evaluate", argv))
    print(markdown(record))
    if arguments.plot is not None:
        plot(record, arguments.plot)
    return 0


def _measure_and_write(arguments: argparse.Namespace, measurement: Measurement) -> dict[str, Any]:
    counts = {name: getattr(arguments, name) for name in ("captions", "switches", "rollouts")}
    record: dict[str, Any] = {}
    if arguments.json is not None and arguments.json.exists() and arguments.columns != COLUMNS:
        record = read_results(arguments.json)
        if record["counts"] != counts:
            raise SystemExit(f"{arguments.json}: got counts {record['counts']}, expected {counts}")
    record |= {
        "network": "demo",
        "rollout_bounded_means": f"latent std within {STD_BOUNDS} of the unquantized one's in every chunk, and the "
        f"mean error of the last 15 s of 60 at most {GROWTH_BOUND} times that of the second 15 s",
        "counts": counts,
    }
    with tempfile.TemporaryDirectory() as temporary:
        for _ in measure(record, arguments.weights, arguments.keep or Path(temporary), arguments):
            for name in arguments.columns:  # columns of an earlier run keep their commit
                record["recipes"][name]["commit"] = measurement.commit
            if arguments.json is not None:
                hardware = f"{cpu()}, no GPU"
                measurement.write(arguments.json, record, code=CODE, hardware=hardware, versions=versions(*PACKAGES))
    return record


if __name__ == "__main__":
    sys.exit(main())
