# SPDX-License-Identifier: Apache-2.0
"""Encodes frames as JPEG or H.264. Runs in the response writer's thread.

PyAV (extra `encode`) is imported when the first session with such a format starts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from longlive_serve.engine.client_stream import Encode
from longlive_serve.protocol.errors import invalid
from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import H264, JPEG, RAW

JPEG_QSCALE = 3  # 1 (best) to 31
H264_CRF = "18"
H264_ENCODERS = {  # the first one that opens on this machine is used
    "h264_nvenc": {"preset": "p4", "tune": "ull", "zerolatency": "1", "cq": H264_CRF},
    "libx264": {"preset": "veryfast", "tune": "zerolatency", "crf": H264_CRF},
}


def make_encode(frame_format: str | None, size: tuple[int, int], fps: int) -> Encode | None:
    """The encoder of a session's chunks; None for raw frames. `size`: height and width of a frame.

    Raises RequestError INVALID_REQUEST when this server cannot encode.
    """
    if frame_format in (None, RAW):
        return None
    try:
        open_context = {JPEG: _open_jpeg, H264: _open_h264}[frame_format]
        return Encoder(open_context(size, fps)).encode
    except ImportError:
        raise invalid(
            f"OPTIONS.format: got {frame_format!r}, expected {RAW!r}: this server has no PyAV "
            "(pip install 'longlive-serve[encode]' there)"
        ) from None


class Encoder:
    """Encodes the frames of one session in order: H.264 frames refer to earlier ones."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._frame = 0

    def encode(self, chunk: FrameChunk) -> FrameChunk:
        """`chunk` with its frames encoded, one packet each."""
        encoded = tuple(packet for image in chunk.frames for packet in self._encode_frame(image))
        return dataclasses.replace(chunk, frames=chunk.frames[:0], encoded=encoded)

    def _encode_frame(self, image: np.ndarray[Any, Any]) -> list[bytes]:
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame = frame.reformat(format=self._context.pix_fmt)
        frame.pts, self._frame = self._frame, self._frame + 1
        encoded = [bytes(packet) for packet in self._context.encode(frame)]
        assert len(encoded) == 1, "each frame must give one packet at once"
        return encoded


def _open_jpeg(size: tuple[int, int], fps: int) -> Any:
    return _open("mjpeg", size, fps, "yuvj420p", {"qmin": str(JPEG_QSCALE), "qmax": str(JPEG_QSCALE)})


def _open_h264(size: tuple[int, int], fps: int) -> Any:
    name = _h264_encoder(size)
    return _open(name, size, fps, "yuv420p", H264_ENCODERS[name])


@functools.cache
def _h264_encoder(size: tuple[int, int]) -> str:
    import av

    for name, options in H264_ENCODERS.items():
        try:
            _open(name, size, 16, "yuv420p", options)
            return name
        except (av.FFmpegError, ValueError):
            continue
    raise invalid("OPTIONS.format: got 'h264', expected 'raw' or 'jpeg': this server has no H.264 encoder")


def _open(codec: str, size: tuple[int, int], fps: int, pixels: str, options: dict[str, str]) -> Any:
    import fractions

    import av

    context: Any = av.CodecContext.create(codec, "w")
    context.height, context.width = size
    context.pix_fmt, context.time_base, context.framerate = pixels, fractions.Fraction(1, fps), fps
    context.options, context.thread_count, context.gop_size = options, 1, 4 * fps
    context.open()
    return context
