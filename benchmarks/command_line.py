# SPDX-License-Identifier: Apache-2.0
"""Shared by all measuring commands: exit codes, arguments, and the writer of results/serving.json."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec

from benchmarks.results import SERVER, Measurement, cpu, versions
from longlive_serve.triton_server.arguments import DEFAULT_REPOSITORY

DEMO = DEFAULT_REPOSITORY / "longlive/1/demo"
P = ParamSpec("P")


def exit_code(*errors: type[Exception]) -> Callable[[Callable[P, int]], Callable[P, int]]:
    """Decorates `main`: it returns 130 after Ctrl-C, 1 after OSError, RuntimeError, ValueError or `errors`."""
    expected: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *errors)

    def decorate(main: Callable[P, int]) -> Callable[P, int]:
        @functools.wraps(main)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> int:
            try:
                return main(*args, **kwargs)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                return 130
            except expected as error:
                print(f"error: {error}", file=sys.stderr)
                return 1

        return wrapper

    return decorate


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse `type`: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text}, expected {minimum} or more")
        return int(text)

    return parse


def add_cluster_arguments(parser: argparse.ArgumentParser, counts: Iterable[tuple[str, int, str]]) -> None:
    """Add --preset, --weights, --json, and an integer option for each of `counts` (name, default, help)."""
    parser.add_argument("--preset", default="demo", help="default: %(default)s")
    parser.add_argument("--weights", default=str(DEMO), help="a folder, or random (default: the demo weights)")
    for name, count, text in counts:
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{text} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")


def write_serving_results(
    measurement: Measurement,
    path: Path | None,
    results: Mapping[str, Any],
    *,
    section: str,
    code: str,
    top_level: Mapping[str, float] | None = None,
) -> None:
    """Write a section of results/serving.json, if `path` is given. `code`: the command's own file."""
    if path is not None:
        measurement.write(
            path,
            {"vae": "in every figure", **results},
            code=[*SERVER, "client", "benchmarks/serving", code],
            hardware=f"{cpu()}, clients and servers together",
            versions=versions("tritonclient"),
            section=section,
            top_level=top_level,
        )
