# SPDX-License-Identifier: Apache-2.0
"""The evaluation's figures as rows of a table, as Markdown and as a picture. Called by `evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import markdown_table
from longlive_serve.config.presets import DIT, FPS, TEXT_ENCODER, VAE_DECODER

FRAMES_OF_CHUNK = 12
UNQUANTIZED = "unquantized"
SHORT = {DIT: "DiT", TEXT_ENCODER: "text", VAE_DECODER: "VAE"}


def rows(record: Mapping[str, Any]) -> list[list[str]]:
    """A heading, then a row per measure; a column per recipe, the unquantized model first."""
    columns = [record[UNQUANTIZED], *record["recipes"].values()]
    steps = len(next((c["flow_rel_error_by_step"] for c in columns if "flow_rel_error_by_step" in c), ()))

    def row(title: str, key: str, form: str, scale: float = 1.0) -> list[str]:
        return [title, *(form.format(scale * c[key]) if key in c else "" for c in columns)]

    def row_of_list(title: str, key: str, place: int) -> list[str]:
        return [title, *(f"{100 * c[key][place]:.1f} %" if key in c else "" for c in columns)]

    def row_of_total(title: str, key: str) -> list[str]:
        return [title, *(f"{sum(c[key].values()) / 1e6:.1f} MB" if key in c else "" for c in columns)]

    return [
        ["", UNQUANTIZED, *record["recipes"]],
        ["in 8 bits", "", *(", ".join(SHORT[name] for name in column["formats"]) for column in columns[1:])],
        row("full-size file, of bfloat16", "bytes_ratio", "{:.1f} %", 100),
        row("the same at demo size", "bytes_ratio_demo", "{:.1f} %", 100),
        row_of_total("all demo files", "bytes_on_disk"),
        row_of_total("in memory, rest in bfloat16", "bytes_in_memory"),
        *(row_of_list(f"flow, error at step {step + 1}", "flow_rel_error_by_step", step) for step in range(steps)),
        row("latents, error after chunk 1", "latent_rel_error_after_chunk_1", "{:.1f} %", 100),
        row("latents, error after chunk 20", "latent_rel_error_after_chunk_20", "{:.1f} %", 100),
        row("latents, error after 60 s", "latent_rel_error_after_60s", "{:.1f} %", 100),
        row("latents, error through 60 s", "latent_rel_error", "{:.1f} %", 100),
        row("growth of that error", "error_growth", "{:.2f} x"),
        row("PSNR of frames through 60 s", "psnr_db", "{:.1f} dB"),
        row("attributes right at 60 s", "attributes_right_at_60s", "{:.1f} %", 100),
        row("attributes right, 1.5 s and 7 s", "attribute_accuracy", "{:.1f} %", 100),
        row("switch adopted in 2 chunks", "switch_adoption_within_2_chunks", "{:.1f} %", 100),
    ]


def markdown(record: Mapping[str, Any]) -> str:
    heading, *body = rows(record)
    counts = record["counts"]
    heading[0] = f"{counts['captions']} captions, {counts['switches']} switches, {counts['rollouts']} videos of 60 s"
    blocks = _blocks(record)
    parts = [markdown_table(heading, body)]
    if blocks:  # of recipes alone
        numbers = ["error of the flow with one block quantized", *map(str, range(1, 1 + len(blocks[0][1])))]
        errors_of = [[name, *(f"{100 * error:.1f} %" for error in errors)] for name, errors in blocks]
        parts.append(markdown_table(numbers, errors_of))
    return "\n\n".join(parts)


def _blocks(record: Mapping[str, Any]) -> list[tuple[str, Sequence[float]]]:
    key = "flow_rel_error_of_block_alone"
    return [(name, figures[key]) for name, figures in record["recipes"].items() if key in figures]


def plot(record: Mapping[str, Any], path: Path) -> None:
    """Error against depth, and against time, as PNG."""
    from matplotlib.figure import Figure  # of the extra `bench`

    figure = Figure(figsize=(12, 4), layout="constrained")
    depth, time, picture = figure.subplots(1, 3)
    blocks = range(0)
    for number, (name, figures) in enumerate(record["recipes"].items()):
        color = f"C{number}"
        seconds = [(chunk + 1) * FRAMES_OF_CHUNK / FPS for chunk in range(len(figures["psnr_db_by_chunk"]))]
        if "rel_error_after_block" in figures:
            blocks = range(1, 1 + len(figures["rel_error_after_block"]))
            depth.plot(
                blocks,
                _percent(figures["rel_error_after_block"]),
                "o-",
                color=color,
                label=f"{name}: what the block hands on",
            )
            alone = _percent(figures["flow_rel_error_of_block_alone"])
            depth.plot(blocks, alone, "x:", color=color, label=f"{name}: the flow, this block alone quantized")
        if figures["latent_rel_error"]:
            time.plot(seconds, _percent(figures["latent_rel_error_by_chunk"]), color=color, label=name)
        picture.plot(seconds, figures["psnr_db_by_chunk"], color=color, label=name)
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


def _percent(errors: Sequence[float]) -> list[float]:
    return [100 * error for error in errors]
