# SPDX-License-Identifier: Apache-2.0
"""Writes frames to an mp4 file as they arrive. It does not know streams or prompts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import av.video.stream
import numpy as np

from longlive_serve.config.presets import FPS


class VideoFile:
    """An H.264 file in a `with` block.

    The block writes `<name>.partial.mp4`, and renames it at the end, replacing an existing file. After an exception
    (Ctrl-C too) the partial file stays and can be played; without any frame no file stays.
    """

    def __init__(self, path: Path | str, *, fps: int = FPS, crf: int = 18) -> None:
        """crf: x264's quality, 0 (lossless) to 51 (worst)."""
        if not 0 <= crf <= 51:
            raise ValueError(f"crf: got {crf}, expected 0 to 51")
        self.path = Path(path)
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial.mp4")
        self.frames = 0
        self._fps = fps
        self._crf = crf
        self._container: av.container.OutputContainer | None = None
        self._stream: av.video.stream.VideoStream | None = None
        self._size = (0, 0)

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(self.partial_path), "w", format="mp4", options={"movflags": "+faststart"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._container is not None
        try:
            if self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
        if not self.frames:
            self.partial_path.unlink(missing_ok=True)
        elif error is None:
            self.partial_path.replace(self.path)

    def write(self, frames: np.ndarray[Any, Any]) -> None:
        """Append uint8 [frames, height, width, RGB]; all of one size."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                f"frames: got {frames.dtype} {list(frames.shape)}, expected uint8 [frames, height, width, 3]"
            )
        for frame in frames:
            self._write(frame)

    def _write(self, frame: np.ndarray[Any, Any]) -> None:
        assert self._container is not None
        height, width = frame.shape[:2]
        if self._stream is None:
            self._size = (height, width)
            self._stream = self._add_stream(height, width)
        if (height, width) != self._size:
            raise ValueError(f"frames: got {height}x{width}, expected {self._size[0]}x{self._size[1]} as before")
        # yuv420p has no odd sizes: repeat the last row or column.
        even = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        image = av.VideoFrame.from_ndarray(even, format="rgb24")
        image.pts = self.frames
        image.time_base = Fraction(1, self._fps)
        self._container.mux(self._stream.encode(image))
        self.frames += 1

    def _add_stream(self, height: int, width: int) -> av.video.stream.VideoStream:
        assert self._container is not None
        stream = self._container.add_stream("libx264", rate=self._fps, options={"crf": str(self._crf)})
        stream.height = height + height % 2
        stream.width = width + width % 2
        stream.pix_fmt = "yuv420p"
        return stream
