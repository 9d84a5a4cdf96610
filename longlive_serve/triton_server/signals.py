# SPDX-License-Identifier: Apache-2.0
"""Handles SIGTERM in a process whose main thread is in C++, like the stub of Triton's Python backend.

Called by `model.py`. Python runs signal handlers only in the main thread, which never returns from C++ there. The byte
that the interpreter writes to its wakeup descriptor for each signal still arrives.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable


def on_sigterm(handler: Callable[[], None]) -> None:
    """Call `handler` in a new thread on the first SIGTERM, instead of exiting. Must be called from the main thread."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def wait() -> None:
        while reader.recv(1)[0] != signal.SIGTERM:
            pass
        writer.detach()  # keeps it open for later signals
        handler()

    threading.Thread(target=wait, name="longlive-sigterm", daemon=True).start()
