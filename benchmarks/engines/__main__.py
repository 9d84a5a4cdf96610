# SPDX-License-Identifier: Apache-2.0
"""Benchmarks an eager baseline and the server's backends on one device, one after the other.

The models have random weights and run in this process, through the server's model runner and engine core. Results are
written only with --json and --plot.
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
Each row reports ms per chunk by phase (denoise: 4 steps; kv_cache_update; decode: the VAE; host: the rest), frames per
second without and with the VAE, time to first frame, prompt-switch latency, memory per session, and the largest number
of live sessions at 16 fps without a late chunk. The same run measures the speed of matrix products and copies, each
backend's share of it, and all attention kernels.

examples:
  python -m benchmarks.engines                                        # preset tiny on the CPU, longlive-1.3b on a GPU
  python -m benchmarks.engines --json results/gpu.json --plot docs/gpu.png
  python -m benchmarks.engines --rows "eager baseline" "fused fp8" --chunks 100 --live-seconds 60
  python -m benchmarks.engines --rows torch --tensorrt-engines engines/bf16
  python -m benchmarks.engines --check --rows fused "fused all fp8"   # compare the results with torch's
"""


class Bar:
    """Shows progress on stderr: a bar on a terminal, otherwise one line per row."""

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
    log_level = at_level("longlive_serve", logging.ERROR)  # warnings about late chunks would break the bar
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
        print("stopped; the results are incomplete", file=sys.stderr)
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
    text = "skip FlexAttention in the attention table; compiling it takes a minute"
    parser.add_argument("--no-flex", action="store_true", help=text)
    text = "first compare each row's results with the torch backend's; wrong results fail the row"
    parser.add_argument("--check", action="store_true", help=text)
    text = "add a row `onnxruntime`: graphs of `python -m export.to_onnx` with this preset and random weights"
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help=text)
    text = "add a row `tensorrt`: engines that `python -m export.to_tensorrt` built from such graphs"
    parser.add_argument("--tensorrt-engines", type=Path, metavar="FOLDER", help=text)
    text = "chunks measured per row; half as many first frames and prompt switches (default: %(default)s)"
    parser.add_argument("--chunks", type=at_least(4), default=24, metavar="N", help=text)
    text = "unmeasured chunks of the same video before them, until the window is full (default: %(default)s)"
    parser.add_argument("--warmup", type=at_least(0), default=10, metavar="N", help=text)
    text = "seconds per number of live sessions (default: %(default)g)"
    parser.add_argument("--live-seconds", type=float, default=10.0, metavar="S", help=text)
    text = "maximum number of concurrent live sessions, one slot each (default: 8 on a GPU, 2 on the CPU)"
    parser.add_argument("--max-sessions", type=at_least(1), metavar="N", help=text)
    parser.add_argument("--json", type=Path, help="write the results to this file, after every row")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the phases of a chunk (needs matplotlib)")
    args = parser.parse_args(argv)
    on_cuda = torch.cuda.is_available() if args.device == AUTO else args.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch finds no GPU")
    for option in ("graphs", "tensorrt_engines"):
        folder = getattr(args, option)
        if folder is not None and not (folder / MANIFEST).is_file():
            name = option.replace("_", "-")
            parser.error(f"--{name} {folder}: no {MANIFEST} found, expected an output folder of the export")
    args.device = ("cuda" if on_cuda else "cpu") if args.device == AUTO else args.device
    args.preset = args.preset or ("longlive-1.3b" if on_cuda else "tiny")
    args.max_sessions = args.max_sessions or (8 if on_cuda else 2)
    if args.warmup + 2 * args.chunks > MAX_FRAMES // PRESETS[args.preset].window.chunk:
        parser.error(f"--warmup {args.warmup} --chunks {args.chunks}: more chunks than a video can have")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed")
    return args


if __name__ == "__main__":
    sys.exit(main())
