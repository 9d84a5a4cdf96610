# SPDX-License-Identifier: Apache-2.0
"""Decodes JPEG or H.264 frames. Used by `request_tracker.py`."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import av
import numpy as np

from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import H264, JPEG

FrameChunkT = TypeVar("FrameChunkT", bound=FrameChunk)
CODECS = {JPEG: "mjpeg", H264: "h264"}


class Decoder:
    """Decodes the frames of one session over one connection, in order."""

    def __init__(self, frame_format: str) -> None:
        self._context = av.CodecContext.create(CODECS[frame_format], "r")
        self._context.thread_count = 1  # more threads would delay frames
        self._context.flags |= av.codec.context.Flags.low_delay

    def decode(self, chunk: FrameChunkT) -> FrameChunkT:
        """`chunk` with decoded frames, uint8 [frames, height, width, RGB]. Raises ValueError for invalid data."""
        try:
            images = [
                frame.to_ndarray(format="rgb24")
                for data in chunk.encoded
                for frame in self._context.decode(av.Packet(data))  # type: ignore[attr-defined]
            ]
        except av.FFmpegError as error:
            raise ValueError(f"the frames cannot be decoded: {error}") from None
        if len(images) != len(chunk.encoded):
            raise ValueError(f"got {len(images)} images from {len(chunk.encoded)} encoded frames")
        return dataclasses.replace(chunk, frames=np.stack(images), encoded=())
