# SPDX-License-Identifier: Apache-2.0
"""How a trial's command ends when it cannot: by Ctrl-C, or with an error that is said. Used by every trial."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TypeVar

Figures = TypeVar("Figures")


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
