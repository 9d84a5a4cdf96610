# SPDX-License-Identifier: Apache-2.0
"""What Triton and the model's process write: read to its end, its last lines kept, shown where somebody looks.

Used by the process group. It knows how Triton's lines look.
"""

from __future__ import annotations

import collections
import re
import sys
import threading
from collections.abc import Callable
from typing import IO

from longlive_serve.triton_server.standard_outputs import Output

MOST_LINES = 20  # of a complaint


class TritonLog(threading.Thread):
    """Reads the group's output to its end; keeps the last lines.

    It must never wait: unread output would bring Triton to a halt.
    """

    _OF_TRITON = re.compile(r"[IWEF]\d{4} \d\d:\d\d|[+|]|Signal \(|error: creating server")  # the bars are tables
    _ERROR = re.compile(r'(?:E\d{4} \S+ \d+ \S+\] "?|error: )(?P<text>.*?)"?$')
    _EMPTY_WORDS = (
        "CudaDriverHelper has not been initialized",  # every machine without a GPU
        "is not healthy",  # of a model that has ended
        "failed to load all models",
    )

    def __init__(self, stream: IO[bytes], echo: bool, rename: Callable[[str], str]) -> None:
        """`echo`: to stderr, which may be changed later. `rename`: puts the names that people know into a line."""
        super().__init__(name="triton-log", daemon=True)
        self.echo = echo
        self._stream = stream
        self._rename = rename
        self._output = Output(sys.stderr)
        self._lines: collections.deque[str] = collections.deque(maxlen=2000)
        self.start()

    def run(self) -> None:
        for raw in self._stream:
            line = self._rename(raw.decode(errors="replace"))
            self._lines.append(line)
            if self.echo:
                self._output.write(line)

    def finish(self) -> None:
        """After the group has ended: read what is left of its output."""
        self.join(timeout=5)
        self._output.close()

    def text(self) -> str:
        return "".join(self._kept())

    def errors(self) -> str:
        """What Triton logged as errors; empty: nothing that tells more than that it has ended."""
        texts = [match["text"].replace("\\n", "\n").strip() for match in map(self._ERROR.match, self._kept()) if match]
        return "\n".join(text for text in texts if not any(words in text for words in self._EMPTY_WORDS))

    def last_lines(self) -> str:
        """Triton's complaint about its options, or the last lines."""
        lines = self._kept()
        usage = next((number for number, line in enumerate(lines) if line.startswith("Usage:")), 0)
        return "".join(lines[:usage] or lines[-MOST_LINES:]).rstrip() or "(it logged nothing)"

    def words_of_the_model(self) -> str:
        """The last lines that are not Triton's: those of the model's process, or of the shell that was to start it."""
        return "".join(self._of_the_model()[-MOST_LINES:]).rstrip() or "(it said nothing)"

    def is_silent(self) -> bool:
        """Whether neither the model's process nor Triton has said what is wrong."""
        return not self.errors() and not self._of_the_model()

    def _of_the_model(self) -> list[str]:
        return [line for line in self._kept() if line.strip() and not self._OF_TRITON.match(line)]

    def _kept(self) -> list[str]:
        return list(self._lines)
