# SPDX-License-Identifier: Apache-2.0
"""A contact sheet of a video: one row per prompt, frames in order from left to right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np

COLUMNS = 8
CELL = 160  # pixels of a frame's longer side in the sheet, approximately
GAP = 4


class ContactSheet:
    """Collects small copies of frames; `write` selects up to COLUMNS of each row at even distances."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[np.ndarray[Any, Any]]] = {}

    def add(self, video: int, prompt_index: int, frame: np.ndarray[Any, Any]) -> None:
        """Add one uint8 [height, width, RGB] to the row of this prompt. All frames must have one size."""
        max_side = max(frame.shape[:2])
        step, times = -(-max_side // CELL), max(1, CELL // max_side)
        small = frame[::step, ::step].repeat(times, axis=0).repeat(times, axis=1)
        self._rows.setdefault((video, prompt_index), []).append(small)

    def write(self, path: Path | str) -> None:
        """Write the sheet as PNG. Raises ValueError if there are no frames."""
        if not self._rows:
            raise ValueError("contact sheet: got no frames, expected at least one")
        rows = [_chosen(self._rows[key]) for key in sorted(self._rows)]
        height, width = rows[0][0].shape[:2]
        columns = max(len(row) for row in rows)
        sheet = np.full(((height + GAP) * len(rows) + GAP, (width + GAP) * columns + GAP, 3), 255, np.uint8)
        for y, row in enumerate(rows):
            for x, cell in enumerate(row):
                top, left = GAP + y * (height + GAP), GAP + x * (width + GAP)
                sheet[top : top + height, left : left + width] = cell
        _write_png(Path(path), sheet)


def _chosen(frames: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    count = min(COLUMNS, len(frames))
    return [frames[int(i)] for i in np.linspace(0, len(frames) - 1, count).round()]


def _write_png(path: Path, image: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png")
        stream.height, stream.width = image.shape[:2]
        stream.pix_fmt = "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
