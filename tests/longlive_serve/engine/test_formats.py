# SPDX-License-Identifier: Apache-2.0
"""Frames that travel as JPEG or H.264, and frames that are sent in parts: what comes out is the video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from longlive_client.frame_decoder import Decoder
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.frame_encoder import make_encode
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk

pytestmark = pytest.mark.numeric

SIZE = (48, 64)


def ramp(first: int, frames: int) -> FrameChunk:
    """A soft gradient that moves to the right."""
    x, y = np.meshgrid(np.arange(SIZE[1]), np.arange(SIZE[0]))
    pictures = [np.stack([2 * (x + n) % 256, 3 * y % 256, x + y + n], -1) for n in range(first, first + frames)]
    return FrameChunk(frames=np.stack(pictures).astype(np.uint8), first_frame=first, prompt_index=0, seconds=0.1)


@pytest.mark.parametrize(("frame_format", "most"), [("jpeg", 4.0), ("h264", 6.0)])
def test_every_frame_comes_back_at_once_and_almost_the_same(frame_format: str, most: float) -> None:
    encode, decoder = make_encode(frame_format, SIZE, 16), Decoder(frame_format)
    assert encode is not None
    for sent in (ramp(0, 9), ramp(9, 12), ramp(21, 1), ramp(22, 4)):
        wire = FrameChunk.from_tensors(encode(sent).to_tensors())
        assert not len(wire.frames)
        assert sum(map(len, wire.encoded)) < sent.frames.nbytes / 3
        came = decoder.decode(wire)
        assert came.frames.shape == sent.frames.shape
        assert np.abs(came.frames.astype(int) - sent.frames.astype(int)).mean() < most


def test_raw_needs_no_encoder() -> None:
    assert make_encode(None, SIZE, 16) is None
    assert make_encode("raw", SIZE, 16) is None


def test_without_pyav_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(RequestError, match=r"OPTIONS.format: got 'jpeg', expected 'raw'.*longlive-serve\[encode\]"):
        make_encode("jpeg", SIZE, 16)


def test_data_that_is_no_picture_is_refused() -> None:
    broken = FrameChunk(frames=np.empty((0, 1, 1, 3)), first_frame=0, prompt_index=0, encoded=(b"x",))
    with pytest.raises(ValueError, match=r"cannot be decoded|got 0 images"):
        Decoder("jpeg").decode(broken)


def test_partial_chunks_are_the_whole_chunk_to_the_bit() -> None:
    config = ServeConfig(preset="tiny", device="cpu")
    runner = ModelRunner(build_backends(config), config.model_config)

    def video(partial_chunks: bool) -> list[FrameChunk]:
        session = Session(id="s", prompt=Prompt(index=0, text="a fox"), noise=SeededNoise(1), slot=0)
        made: list[FrameChunk] = []
        for _ in range(3):
            made += runner.collect_output(runner.execute_model_async(session, partial_chunks))
        return made

    whole, parts = video(partial_chunks=False), video(partial_chunks=True)
    assert [len(part.frames) for part in parts] == [1, 4, 4, 4, 4, 4, 4, 4, 4]
    assert [part.first_frame for part in parts] == [0, 1, 5, 9, 13, 17, 21, 25, 29]
    assert [part.completes for part in parts] == [False, False, True] * 3
    frames = [np.concatenate([part.frames for part in made]) for made in (whole, parts)]
    assert np.array_equal(*frames)
    assert {phase.name for phase in runner.phases} == {"switch", "denoise", "kv_cache_update", "decode"}
    assert not torch.is_inference_mode_enabled()
