# SPDX-License-Identifier: Apache-2.0
"""Measures a server's start-up time with cold and warm caches: `python -m benchmarks.start_up --json JSON`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command_line import exit_code
from benchmarks.results import SERVER, Measurement, versions
from longlive_serve.doctor.start import measure_starts
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    text = "serve.toml (default: the shipped one, the demo model)"
    parser.add_argument("--config", type=Path, metavar="TOML", default=DEFAULT_CONFIG, help=text)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    measurement = Measurement.begin("benchmarks.start_up", argv)
    results = {"seconds": measure_starts(args.config.absolute())}
    print(json.dumps(results, indent=2))
    if args.json is not None:
        measurement.write(args.json, results, code=SERVER, versions=versions("torch", "transformers"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
