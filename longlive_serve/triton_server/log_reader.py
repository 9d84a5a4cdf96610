# SPDX-License-Identifier: Apache-2.0
"""Reads the output of Triton and of the model's process, keeps its last lines and finds the errors in it.

Used by the process group. It knows the format of Triton's log lines.
"""

from __future__ import annotations

import collections
import re
import sys
import threading
from collections.abc import Callable
from typing import IO

from longlive_serve.triton_server.standard_outputs import Output

MAX_LINES = 20  # of an error message


class TritonLog(threading.Thread):
    """Reads the output of a process group to its end, and keeps the last lines.

    It must never block: Triton halts when its output is not read.
    """

    _TRITON_LINE = re.compile(r"[IWEF]\d{4} \d\d:\d\d|[+|]|Signal \(|error: creating server")  # | and + are of tables
    _ERROR_LINE = re.compile(r'(?:E\d{4} \S+ \d+ \S+\] "?|error: )(?P<text>.*?)"?$')
    _IGNORED_ERRORS = (
        "CudaDriverHelper has not been initialized",  # on every machine without a GPU
        "is not healthy",  # follows from a model that has ended
        "failed to load all models",
    )

    def __init__(self, stream: IO[bytes], verbose: bool, rename: Callable[[str], str]) -> None:
        """`verbose`: print each line to stderr; may be changed later. `rename`: replaces scratch paths in a line."""
        super().__init__(name="triton-log", daemon=True)
        self.verbose = verbose
        self._stream = stream
        self._rename = rename
        self._output = Output(sys.stderr)
        self._lines: collections.deque[str] = collections.deque(maxlen=2000)
        self.start()

    def run(self) -> None:
        for raw in self._stream:
            line = self._rename(raw.decode(errors="replace"))
            self._lines.append(line)
            if self.verbose:
                self._output.write(line)

    def finish(self) -> None:
        """Read the rest of the output, after the group has ended."""
        self.join(timeout=5)
        self._output.close()

    def text(self) -> str:
        return "".join(self._lines)

    def errors(self) -> str:
        """The errors that Triton logged, without those that only say that it ended."""
        texts = [
            match["text"].replace("\\n", "\n").strip()
            for match in map(self._ERROR_LINE.match, list(self._lines))
            if match
        ]
        return "\n".join(text for text in texts if not any(ignored in text for ignored in self._IGNORED_ERRORS))

    def last_lines(self) -> str:
        """Triton's error about its options, or the last lines."""
        lines = list(self._lines)
        usage = next((number for number, line in enumerate(lines) if line.startswith("Usage:")), 0)
        return "".join(lines[:usage] or lines[-MAX_LINES:]).rstrip() or "(no output)"

    def model_lines(self) -> str:
        """The last lines that are not Triton's: of the model's process, or of the shell that starts it."""
        return "".join(self._model_output()[-MAX_LINES:]).rstrip() or "(no output)"

    def has_errors(self) -> bool:
        """Whether Triton has logged an error, or the model's process has written anything."""
        return bool(self.errors() or self._model_output())

    def _model_output(self) -> list[str]:
        return [line for line in list(self._lines) if line.strip() and not self._TRITON_LINE.match(line)]
