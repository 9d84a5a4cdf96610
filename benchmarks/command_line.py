# SPDX-License-Identifier: Apache-2.0
"""What commands that measure share: exit codes, arguments, and the header of results/serving.json."""

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
    """Decorates `main`: it returns 130 after Ctrl-C and 1 after an error that is expected or one of `errors`."""
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
    """The `type` of an argument."""

    def parse(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text}, expected {minimum} or more")
        return int(text)

    return parse


def add_cluster_arguments(parser: argparse.ArgumentParser, counts: Iterable[tuple[str, int, str]]) -> None:
    """What several servers serve, how many there are of what (name, default, explanation), and the results' file."""
    parser.add_argument("--preset", default="demo", help="default: %(default)s")
    parser.add_argument("--weights", default=str(DEMO), help="a folder, or random (default: those of the demo)")
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
    """Write a section of results/serving.json, if there is a `path`. `code`: the command's own file."""
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
