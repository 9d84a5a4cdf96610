# SPDX-License-Identifier: Apache-2.0
"""Formats the evaluation's results as Markdown and as a plot. Called by `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import markdown_table
from longlive_serve.config.presets import DIT, FPS, TEXT_ENCODER, VAE_DECODER

FRAMES_OF_CHUNK = 12
UNQUANTIZED = "unquantized"
SHORT = {DIT: "DiT", TEXT_ENCODER: "text", VAE_DECODER: "VAE"}


ROWS = {
    "full-size file, of bfloat16": "{bytes_ratio:.1%}",
    "the same at demo size": "{bytes_ratio_demo:.1%}",
    "all demo files": "{total_on_disk:.1f} MB",
    "in memory, rest in bfloat16": "{total_in_memory:.1f} MB",
    **{f"flow, error at step {step + 1}": f"{{flow_rel_error_by_step[{step}]:.1%}}" for step in range(4)},
    "latents, error after chunk 1": "{latent_rel_error_after_chunk_1:.1%}",
    "latents, error after chunk 20": "{latent_rel_error_after_chunk_20:.1%}",
    "latents, error after 60 s": "{latent_rel_error_after_60s:.1%}",
    "latents, error through 60 s": "{latent_rel_error:.1%}",
    "growth of that error": "{error_growth:.2f} x",
    "PSNR of frames through 60 s": "{psnr_db:.1f} dB",
    "attributes right at 60 s": "{attributes_right_at_60s:.1%}",
    "attributes right, 1.5 s and 7 s": "{attribute_accuracy:.1%}",
    "switch adopted in 2 chunks": "{switch_adoption_within_2_chunks:.1%}",
}
BLOCK_ERRORS = "flow_rel_error_of_block_alone"


def markdown(record: Mapping[str, Any]) -> str:
    """One row per measure, one column per recipe; the unquantized model first."""
    columns, counts, recipes = [record[UNQUANTIZED], *record["recipes"].values()], record["counts"], record["recipes"]
    title = f"{counts['captions']} captions, {counts['switches']} switches, {counts['rollouts']} videos of 60 s"
    formats = (", ".join(SHORT[name] for name in recipe["formats"]) for recipe in recipes.values())
    rows = [(name, *(_cell(form, column) for column in columns)) for name, form in ROWS.items()]
    rows = [row for row in rows if any(row[1:]) or not row[0].startswith("flow")]
    tables = [markdown_table([title, UNQUANTIZED, *recipes], [("in 8 bits", "", *formats), *rows])]
    if blocks := {name: recipe[BLOCK_ERRORS] for name, recipe in recipes.items() if BLOCK_ERRORS in recipe}:
        header = ["error of the flow with one block quantized", *range(1, 1 + len(next(iter(blocks.values()))))]
        tables.append(markdown_table(header, ([name, *map(_percent, errors)] for name, errors in blocks.items())))
    return "\n\n".join(tables)


def _cell(form: str, column: Mapping[str, Any]) -> str:
    """Empty if it was not measured."""
    totals = {
        f"total_{where}": sum(column[f"bytes_{where}"].values()) / 1e6
        for where in ("on_disk", "in_memory")
        if f"bytes_{where}" in column
    }
    try:
        return form.format_map({**column, **totals}).replace("%", " %")
    except KeyError:
        return ""


def _percent(share: float) -> str:
    return f"{share:.1%}".replace("%", " %")


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Plot the errors over depth and over time, as PNG."""
    from matplotlib.figure import Figure  # of the extra `bench`

    figure = Figure(figsize=(12, 4), layout="constrained")
    depth, time, picture = figure.subplots(1, 3)
    blocks = range(0)
    for number, (name, results) in enumerate(record["recipes"].items()):
        color = f"C{number}"
        seconds = [(chunk + 1) * FRAMES_OF_CHUNK / FPS for chunk in range(len(results["psnr_db_by_chunk"]))]
        if "rel_error_after_block" in results:
            blocks = range(1, 1 + len(results["rel_error_after_block"]))
            depth.plot(
                blocks,
                [100 * error for error in results["rel_error_after_block"]],
                "o-",
                color=color,
                label=f"{name}: output of the block",
            )
            alone = [100 * error for error in results[BLOCK_ERRORS]]
            depth.plot(blocks, alone, "x:", color=color, label=f"{name}: flow, only this block quantized")
        if results["latent_rel_error"]:
            time.plot(seconds, [100 * error for error in results["latent_rel_error_by_chunk"]], color=color, label=name)
        picture.plot(seconds, results["psnr_db_by_chunk"], color=color, label=name)
    for axes, x, y in (
        (depth, "block of the DiT", "relative error, %"),
        (time, "seconds of video", "relative error of the latents, %"),
        (picture, "seconds of video", "PSNR of the frames, dB"),
    ):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    depth.set_xticks(blocks)
    depth.set_ylim(bottom=0, top=1.4 * depth.get_ylim()[1])  # room for the legend
    time.set_ylim(bottom=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
