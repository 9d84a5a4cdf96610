# SPDX-License-Identifier: Apache-2.0
"""Measures what one device makes of LongLive: an eager baseline, then our backends, one after the other.

The models have random weights and run in this process, through the server's own model runner and engine core. Without
--json and --plot nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.command_line import at_least
from benchmarks.engines.measure import Plan
from benchmarks.engines.record import SECTION, write_record
from benchmarks.engines.rows import ROWS, exported
from benchmarks.engines.run import Run
from benchmarks.engines.show import plot, tables
from benchmarks.results import Measurement
from longlive_serve.backends.exported.manifest import MANIFEST
from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import AUTO
from longlive_serve.models.dit.rope import MAX_FRAMES
from longlive_serve.models.text_encoder import BYTE_VOCABULARY
from longlive_serve.observability.log_setup import at_level

EPILOG = """
What a row says: ms per chunk by phase (denoise: 4 steps; kv_cache_update; decode: the VAE; host: all else), frames per
second without and with the VAE, the time to the first frame and from a new prompt to its first frames, memory per
session, and with how many live sessions at 16 fps no chunk comes late. Beside them, from the same run: how fast matrix
products and copies are, what share of that each backend reaches, and all attention kernels.

examples:
  python -m benchmarks.engines                                        # a toy on the CPU, or all of it on a GPU
  python -m benchmarks.engines --json results/gpu.json --plot docs/gpu.png
  python -m benchmarks.engines --rows "eager baseline" "fused fp8" --chunks 100 --live-seconds 60
  python -m benchmarks.engines --rows torch --tensorrt-engines engines/bf16
  python -m benchmarks.engines --check --rows fused "fused all fp8"   # do they compute what torch computes?
"""


class Bar:
    """Shows on stderr how far the run is: a bar on a terminal, else a line for each row."""

    def __init__(self, progress: Progress, steps: int) -> None:
        self._progress, self._steps = progress, steps
        self._row, self._task = "", progress.add_task("", total=1)

    def on_progress(self, row: str, step: str) -> None:
        if row != self._row:
            if not self._progress.console.is_terminal:
                print(f"{row} ...", file=sys.stderr, flush=True)
            self._row = row
            self._progress.reset(self._task, total=self._steps)
        self._progress.update(self._task, advance=1, description=f"{row}: {step}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a row failed or none could be measured, 130 after Ctrl-C."""
    args = _arguments(argv)
    measurement = Measurement.begin(SECTION, argv)
    plan = Plan(args.chunks, args.warmup, args.live_seconds, args.max_sessions)
    by_name = {row.name: row for row in ROWS}
    rows = [by_name[name] for name in args.rows] + exported(args.graphs, args.tensorrt_engines)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    log_level = at_level("longlive_serve", logging.ERROR)  # late chunks are counted; the bar stays whole
    with log_level, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        on_progress = Bar(progress, plan.steps).on_progress
        run = Run(args.preset, args.device, rows, plan, on_progress, flex=not args.no_flex, check=args.check)
        with contextlib.suppress(KeyboardInterrupt):
            run.measure(lambda: write_record(args.json, measurement, run.record) if args.json else None)
    record = run.record
    print(*tables(record), sep="\n\n")
    if args.plot and record["rows"]:
        plot(record, args.plot)
    if not record["complete"]:
        print("stopped; this is what had been measured", file=sys.stderr)
        return 130
    return 1 if record["failed"] or not record["rows"] else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {SECTION}",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [row.name for row in ROWS]
    parser.add_argument("--device", default=AUTO, help="auto (cuda when there is one, else cpu), or a torch device")
    presets = [name for name, sizes in PRESETS.items() if sizes.text_encoder.vocab_size >= BYTE_VOCABULARY]
    parser.add_argument("--preset", choices=presets, help="sizes (default: longlive-1.3b on a GPU, tiny on the CPU)")
    parser.add_argument(
        "--rows", nargs="+", choices=names, default=names, metavar="ROW", help=f"in this order, of: {', '.join(names)}"
    )
    text = "leave FlexAttention out of the table of attention kernels: it compiles for a minute"
    parser.add_argument("--no-flex", action="store_true", help=text)
    text = "compare each row's latents and frames with the torch backend's first; a row that is wrong fails"
    parser.add_argument("--check", action="store_true", help=text)
    text = "a row `onnxruntime` of these as well, made by `python -m export.to_onnx` of random weights in this preset"
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help=text)
    text = "and a row `tensorrt`, made of such graphs by `python -m export.to_tensorrt`"
    parser.add_argument("--tensorrt-engines", type=Path, metavar="FOLDER", help=text)
    text = "measured per row; half as many first frames and prompt switches (default: %(default)s)"
    parser.add_argument("--chunks", type=at_least(4), default=24, metavar="N", help=text)
    text = "of the same video, before them; the window has to be full (default: %(default)s)"
    parser.add_argument("--warmup", type=at_least(0), default=10, metavar="N", help=text)
    text = "with each number of live sessions (default: %(default)g)"
    parser.add_argument("--live-seconds", type=float, default=10.0, metavar="S", help=text)
    text = "live at once, at most; each needs its slot (default: 8 on a GPU, 2 on the CPU)"
    parser.add_argument("--max-sessions", type=at_least(1), metavar="N", help=text)
    parser.add_argument("--json", type=Path, help="write the figures to this file, after every row")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the phases of a chunk (needs matplotlib)")
    args = parser.parse_args(argv)
    on_cuda = torch.cuda.is_available() if args.device == AUTO else args.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here")
    for option in ("graphs", "tensorrt_engines"):
        folder = getattr(args, option)
        if folder is not None and not (folder / MANIFEST).is_file():
            name = option.replace("_", "-")
            parser.error(f"--{name} {folder}: there is no {MANIFEST} in it, expected a folder that the export made")
    args.device = ("cuda" if on_cuda else "cpu") if args.device == AUTO else args.device
    args.preset = args.preset or ("longlive-1.3b" if on_cuda else "tiny")
    args.max_sessions = args.max_sessions or (8 if on_cuda else 2)
    if args.warmup + 2 * args.chunks > MAX_FRAMES // PRESETS[args.preset].window.chunk:
        parser.error(f"--warmup {args.warmup} --chunks {args.chunks}: a video has no place for so many chunks")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: there is no matplotlib here")
    return args


if __name__ == "__main__":
    sys.exit(main())
