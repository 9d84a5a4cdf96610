# SPDX-License-Identifier: Apache-2.0
"""What the commands of trials share: options, and how they end by Ctrl-C or with an error that is said."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from longlive_serve.triton_server.arguments import DEFAULT_REPOSITORY

DEMO = DEFAULT_REPOSITORY / "longlive/1/demo"
Figures = TypeVar("Figures")


def add_cluster_arguments(parser: argparse.ArgumentParser, counts: Iterable[tuple[str, int, str]]) -> None:
    """What several servers serve, how many there are of what (name, default, explanation), and the record."""
    parser.add_argument("--preset", default="demo", help="default: %(default)s")
    parser.add_argument("--weights", default=str(DEMO), help="a folder, or random (default: those of the demo)")
    for name, count, what in counts:
        parser.add_argument(f"--{name}", type=int, default=count, help=f"{what} (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures into this file")


def attempt(
    run: Callable[[argparse.Namespace], Figures], args: argparse.Namespace, *errors: type[Exception]
) -> Figures:
    """What `run` measures. Exits with 130 after Ctrl-C, with 1 after an error that is expected or one of `errors`."""
    expected: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, *errors)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
