# SPDX-License-Identifier: Apache-2.0
"""Hears SIGTERM in a process whose main thread is not in Python, as in the stub of Triton's Python backend.

Called by `model.py`. Python runs signal handlers in the main thread only, and there that thread waits in C++; the
byte that the interpreter writes for every signal arrives all the same.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


def on_sigterm(act: Callable[[], None]) -> None:
    """Call `act` in a thread of its own on the first SIGTERM, instead of ending. Call it from the main thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while reader.recv(1)[0] != signal.SIGTERM:
            pass
        writer.detach()  # stays open: a signal after this one must find it
        act()

    threading.Thread(target=wait, name="longlive-sigterm", daemon=True).start()
