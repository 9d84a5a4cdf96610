# SPDX-License-Identifier: Apache-2.0
"""How long a server takes to start, with empty caches and again: `python -m benchmarks.start_up --json JSON`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import SERVER, Measurement, cpu, versions
from longlive_serve.doctor.start import measure
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    text = "serve.toml (default: the shipped one, the demo model)"
    parser.add_argument("--config", type=Path, metavar="TOML", default=DEFAULT_CONFIG, help=text)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    args = parser.parse_args(argv)
    made = Measurement.begin("benchmarks.start_up", argv)
    try:
        seconds = measure(args.config.absolute())
    except (ServerStartError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    record = made.header(hardware=cpu(), versions=versions("torch", "transformers"), code=SERVER)
    text = json.dumps(record | {"seconds": seconds}, indent=2)
    print(text)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
