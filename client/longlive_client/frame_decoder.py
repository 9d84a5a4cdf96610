# SPDX-License-Identifier: Apache-2.0
"""JPEG or H.264 -> frames, for sessions whose frames do not come raw. Used by `request_tracker.py`."""

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
    """The frames of one session over one connection, in order."""

    def __init__(self, frame_format: str) -> None:
        self._context = av.CodecContext.create(CODECS[frame_format], "r")
        self._context.thread_count = 1  # threads would hold frames back
        self._context.flags |= av.codec.context.Flags.low_delay

    def decode(self, chunk: FrameChunkT) -> FrameChunkT:
        """`chunk` with its frames as pictures. Raises ValueError for data that is none."""
        try:
            images = [
                frame.to_ndarray(format="rgb24")
                for data in chunk.encoded
                for frame in self._context.decode(av.Packet(data))  # type: ignore[attr-defined]
            ]
        except av.FFmpegError as error:
            raise ValueError(f"the frames cannot be decoded: {error}") from None
        if len(images) != len(chunk.encoded):
            raise ValueError(f"got {len(images)} pictures of {len(chunk.encoded)} encoded frames")
        return dataclasses.replace(chunk, frames=np.stack(images), encoded=())
