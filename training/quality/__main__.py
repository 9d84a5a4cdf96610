# SPDX-License-Identifier: Apache-2.0
"""Measures the demo model's quality: `python -m training.quality FOLDER --out JSON`.

`--table` prints a results file as the tables of training/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import at_least
from benchmarks.results import SERVER, Measurement, cpu, read_results, versions
from longlive_client.cli.scenes import load_scenes
from longlive_client.cli.timing import Timing
from longlive_client.video_stream import VideoStream
from longlive_serve.triton_server.launcher import TritonServer
from training.quality.measures import ablation, attribute_accuracy, drift, vae_psnr
from training.quality.workers import Workers

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "model_repository/longlive/1/demo"
CODE = (*SERVER, "client", "benchmarks", "examples/story.jsonl", "training", ":!training/train_*.py")
COUNTS = {  # default and minimum
    "captions": (200, 4),  # a quarter are combinations never trained on
    "switches": (100, 1),  # flicker needs a pair with the same background
    "sessions_30s": (100, 0),
    "sessions_240s": (24, 0),
    "clips": (60, 2),
}


def real_time_factor(folder: Path) -> float:
    """Seconds of video per second, of one session with server and client on two cores; VAE and gRPC included."""
    (scene,) = load_scenes(ROOT / "examples/story.jsonl")
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(everywhere)[:2])  # inherited by the server
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".toml") as settings:
            print(f'preset = "demo"\nweights = "{folder.absolute()}"', file=settings, flush=True)
            with TritonServer(config=Path(settings.name)) as server:
                timing = Timing()
                with VideoStream(scene.prompts[0], url=server.grpc_url, chunks=scene.chunks, pace="asap") as stream:
                    for text, frame in zip(scene.prompts[1:], scene.switch_latent_frames, strict=True):
                        stream.switch_prompt(text, at_latent_frame=frame)
                    for chunk in stream.chunks():
                        timing.add(chunk)
    finally:
        os.sched_setaffinity(0, everywhere)
    return timing.real_time_factor


def measure(folder: Path, counts: argparse.Namespace) -> dict[str, Any]:
    quick = vae_psnr(folder, counts.clips) | {"realtime_factor_2_cores": real_time_factor(folder)}  # fail early
    with Workers(folder) as workers:
        accuracy = attribute_accuracy(workers, counts.captions)
        table = ablation(workers, counts.switches)
        drifted = drift(workers, counts.sessions_30s, counts.sessions_240s)
    return {
        **quick,
        "attribute_accuracy": min(accuracy["chunks_1_2"], accuracy["chunks_8_9"]),
        "attribute_accuracy_by": accuracy,
        "switch_adoption_within_2_chunks": table["recache"]["adoption"],
        "switch_kept_attributes": table["recache"]["kept"],
        "on_switch": table,
        **drifted,
    }


def tables(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    counts, by = record["counts"], record["attribute_accuracy_by"]
    psnr = f"{record['vae_psnr_db']:.1f} dB ({record['vae_psnr_db_held_out_combinations']:.1f} dB)"
    lines = [
        "| measured | result (combinations never trained on) |",
        "| --- | --- |",
        f"| VAE decoder, PSNR of unseen clips | {psnr} |",
    ]
    for name, window in (("1.5 s", "chunks_1_2"), ("7 s", "chunks_8_9")):
        held_out = _percent(by[f"{window}_held_out_combinations"])
        lines.append(
            f"| all attributes right at {name}, {counts['captions']} prompts | {_percent(by[window])} ({held_out}) |"
        )
    for when, length in (("at 30 s", "30s"), ("through the last 30 s of 240 s", "240s")):
        if sessions := counts[f"sessions_{length}"]:
            accuracy = _percent(record[f"drift_{length}_accuracy"])
            lines.append(f"| the same {when}, {sessions} sessions | {accuracy} |")
    lines += [
        f"| real-time factor on two CPU cores, VAE and gRPC included | {record['realtime_factor_2_cores']:.1f} |",
        "",
        f"| {counts['switches']} prompt switches | adopted in the first chunk | in the second | kept | flicker |",
        "| --- | --- | --- | --- | --- |",
    ]
    for on_switch, row in record["on_switch"].items():
        shares = " | ".join(_percent(row[name]) for name in ("adoption_first_chunk", "adoption", "kept"))
        flicker = "not measured" if row["flicker"] is None else f"{row['flicker']:.1f} x"
        lines.append(f"| `{on_switch}` | {shares} | {flicker} |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.table is not None:
        print(tables(read_results(arguments.table)))
        return 0
    measurement = Measurement.begin("training.quality", argv)
    counts = {name: getattr(arguments, name) for name in COUNTS}
    results = {"counts": counts, **measure(arguments.folder, arguments)}
    print(json.dumps(results, indent=2))
    if arguments.out is not None:
        hardware = f"{cpu()}, no GPU"
        measurement.write(arguments.out, results, code=CODE, hardware=hardware, versions=versions("torch"))
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.quality", description=__doc__)
    text = "weights, in the layout of the published checkpoints (default: the shipped weights)"
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED, help=text)
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the results to this file")
    parser.add_argument("--table", type=Path, metavar="JSON", help="measure nothing; print the tables of this file")
    for name, (count, least) in COUNTS.items():
        text = f"{least} or more (default: %(default)s)"
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=at_least(least), default=count, metavar="N", help=text)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
