# SPDX-License-Identifier: Apache-2.0
"""Waits until a server that gets no new sessions is empty: `python -m deploy.drain --for 600`, before SIGTERM.

Sessions left after the timeout are ended by the server, with a snapshot to resume on another one. The exit code is
always 0: SIGTERM follows in any case.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from longlive_serve.observability.metrics import sessions_at

DEFAULT_URL = "http://127.0.0.1:8002/metrics"
SETTLE_S = 10.0  # until proxies stop sending new sessions here
POLL_S = 1.0


def drain(ask: Callable[[], int | None], seconds: float, settle_s: float) -> int:
    """Wait at most `seconds`. Returns the number of sessions left."""
    began = time.monotonic()
    while True:
        left, past = ask(), time.monotonic() - began
        if past >= seconds or left is None or (not left and past >= settle_s):
            return left or 0
        time.sleep(min(POLL_S, seconds - past))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.drain", description=__doc__)
    parser.add_argument("--url", default=DEFAULT_URL, help="the server's metrics (default: %(default)s)")
    parser.add_argument("--for", type=float, default=600.0, dest="seconds", metavar="S", help="default: %(default)g")
    text = "minimum wait: new sessions may still arrive (default: %(default)g)"
    parser.add_argument("--settle", type=float, default=SETTLE_S, metavar="S", help=text)
    args = parser.parse_args(argv)
    left = drain(lambda: sessions_at(args.url), args.seconds, args.settle)
    print(f"drained: {left} sessions left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
