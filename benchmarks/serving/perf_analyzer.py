# SPDX-License-Identifier: Apache-2.0
"""Compares NVIDIA's perf_analyzer with `benchmarks.serving` on one server:
`python -m benchmarks.serving.perf_analyzer --concurrency 1,2,3,4`.

Both run sessions at pace asap with prompt switches and measure chunks per second. A missing perf_analyzer is downloaded
(Debian, Ubuntu). Exit code 1 if the two differ by more than 10 %.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.__main__ import PROMPTS, summarize
from benchmarks.serving.viewer import ViewerConfig, run_viewers
from longlive_client.proxies import ENV_NAMES
from longlive_serve.protocol.messages import MODEL_NAME
from longlive_serve.protocol.session_options import ASAP, Options
from longlive_serve.triton_server.launcher import TritonServer

HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "longlive-serve", "perf_analyzer")
REQUESTS, CHUNKS = 20, 2  # per sequence; chunks per request, which perf_analyzer counts as a whole
SWITCH_EVERY = 4  # requests
AGREE = 0.1


def perf_analyzer() -> Path:
    """The path of perf_analyzer; downloads it if it is not installed."""
    found = shutil.which("perf_analyzer")
    if found is not None:
        return Path(found)
    command = HOME / "perf_analyzer"
    if not command.exists():
        print(f"fetching perf_analyzer to {HOME} ...", file=sys.stderr)
        script = Path(__file__).with_suffix("").parent / "perf_analyzer.sh"
        subprocess.run(["sh", str(script), str(HOME)], check=True, env=os.environ | {"PYTHON": sys.executable})
    return command


def input_data() -> dict[str, Any]:
    """One sequence per prompt, which starts with it and switches to the next ones."""
    start = Options(pace=ASAP).to_json()
    sequences = []
    for first in range(len(PROMPTS)):
        steps: list[dict[str, Any]] = []
        for index in range(REQUESTS):
            num_switches, rest = divmod(index, SWITCH_EVERY)
            prompt = {} if rest else {"PROMPT": [PROMPTS[(first + num_switches) % len(PROMPTS)]]}
            steps.append({"CHUNKS": [CHUNKS], **prompt})
        steps[0]["OPTIONS"] = [start]
        sequences.append(steps)
    return {"data": sequences}


def analyze(url: str, concurrency: int, seconds: float, table: Path) -> dict[str, float]:
    """Run perf_analyzer; print its report and write its table to the CSV file `table`."""
    with tempfile.TemporaryDirectory(prefix="longlive-perf-") as folder:
        data = Path(folder, "input.json")
        data.write_text(json.dumps(input_data()), encoding="utf-8")
        command = [str(perf_analyzer()), "-m", MODEL_NAME, "-u", url, "-i", "grpc", "--async", "--streaming"]
        command += ["--input-data", str(data), "--concurrency-range", str(concurrency), "-f", str(table)]
        command += ["--measurement-interval", str(round(1000 * seconds)), "--stability-percentage", "100", "-r", "3"]
        direct = {name: value for name, value in os.environ.items() if name not in ENV_NAMES}  # the server is local
        done = subprocess.run(command, env=direct, capture_output=True, text=True, check=False)
    print(done.stdout)
    found = re.search(r"Response Throughput: ([\d.]+)", done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"perf_analyzer ended with {done.returncode}: {done.stderr.strip()}")
    with table.open(encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    return {"chunks_per_s": float(found[1]), "first_response_p50_s": float(row["p50 latency"]) / 1e6}


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with TritonServer(config=args.config) as server:
        for concurrency in args.concurrency:
            perf = analyze(server.grpc_url, concurrency, args.seconds, args.csv)
            config = ViewerConfig(
                url=server.grpc_url,
                prompts=PROMPTS,
                seconds=args.seconds,
                switch_interval=concurrency * SWITCH_EVERY * CHUNKS / perf["chunks_per_s"],
                pace=ASAP,
            )
            own = summarize(asyncio.run(run_viewers(config, concurrency)), config.fps)
            rows.append(
                {
                    "concurrency": concurrency,
                    "perf_analyzer": perf,
                    "benchmark": {name: own[name] for name in ("chunks_per_s", "frames_per_s", "first_frame_s")},
                    "ratio": perf["chunks_per_s"] / own["chunks_per_s"],
                }
            )
    return rows


@exit_code(subprocess.CalledProcessError)
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.perf_analyzer", description=__doc__)
    parser.add_argument("--concurrency", default="1,2,3,4", help="concurrent sessions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement (default: %(default)g)")
    parser.add_argument("--config", type=Path, metavar="TOML", help="the server's settings (default: the demo model)")
    parser.add_argument("--csv", type=Path, default=Path("results/perf_analyzer.csv"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    args.concurrency = [int(part) for part in args.concurrency.split(",")]
    measurement = Measurement.begin("benchmarks.serving.perf_analyzer", argv)
    rows = run(args)
    for row in rows:
        perf, own = (row[name]["chunks_per_s"] for name in ("perf_analyzer", "benchmark"))
        text = f"perf_analyzer {perf:.2f}, benchmark {own:.2f} chunks per s, ratio {row['ratio']:.3f}"
        print(f"{row['concurrency']} sessions: {text}")
    top_level = {f"{name}_chunks_per_s": rows[-1][name]["chunks_per_s"] for name in ("perf_analyzer", "benchmark")}
    code = "benchmarks/serving/perf_analyzer.py"
    write_serving_results(measurement, args.json, {"runs": rows}, section="trials.perf", code=code, top_level=top_level)
    return 0 if all(abs(row["ratio"] - 1) <= AGREE for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
