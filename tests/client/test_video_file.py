# SPDX-License-Identifier: Apache-2.0
"""mp4 files and contact sheets: what is on the disk afterwards, read back with a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longlive_client.cli.contact_sheet import CELL, COLUMNS, GAP, ContactSheet
from longlive_client.cli.gif import write_gif
from longlive_client.cli.mp4_writer import VideoFile

pytestmark = pytest.mark.numeric


def ramp(count: int, height: int = 32, width: int = 48) -> np.ndarray[Any, Any]:
    """Frames of one grey each, brighter and brighter."""
    levels = np.linspace(40, 220, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def pictures(path: Path) -> np.ndarray[Any, Any]:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def write(path: Path, frames: np.ndarray[Any, Any], **settings: Any) -> None:
    with VideoFile(path, **settings) as file:
        for part in np.array_split(frames, 3):
            file.write(part)


def test_what_was_written_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.mp4"
    write(path, ramp(33))
    got = pictures(path)
    assert got.shape == (33, 32, 48, 3)
    np.testing.assert_allclose(got.mean((1, 2, 3)), ramp(33).mean((1, 2, 3)), atol=4)
    assert list(path.parent.iterdir()) == [path]


def test_it_is_h264_that_every_player_takes_at_16_frames_per_second(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", ramp(16))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
        assert container.duration == av.time_base


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (3, 5)])
def test_an_odd_size_gains_a_row_or_column(tmp_path: Path, height: int, width: int) -> None:
    write(tmp_path / "a.mp4", ramp(6, height, width))
    got = pictures(tmp_path / "a.mp4")
    assert got.shape[1:3] == (height + height % 2, width + width % 2)
    np.testing.assert_allclose(got[-1, -1, -1], 220, atol=6)


def test_a_higher_crf_makes_a_smaller_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    write(tmp_path / "fine.mp4", noise, crf=10)
    write(tmp_path / "coarse.mp4", noise, crf=40)
    assert (tmp_path / "coarse.mp4").stat().st_size < (tmp_path / "fine.mp4").stat().st_size / 2


def interrupt(path: Path, frames: np.ndarray[Any, Any]) -> None:
    with VideoFile(path) as file:
        file.write(frames)
        raise KeyboardInterrupt


def test_an_interrupted_file_can_be_played_under_its_partial_name(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the video of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        interrupt(path, ramp(9))
    assert path.read_bytes() == b"the video of an earlier run"
    assert len(pictures(tmp_path / "a.partial.mp4")) == 9
    write(path, ramp(12))
    assert len(pictures(path)) == 12
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_without_frames_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "a.mp4", ramp(0))
    with VideoFile(tmp_path / "b.mp4"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_frames_of_another_kind_or_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crf: got 52, expected 0 to 51"):
        VideoFile(tmp_path / "a.mp4", crf=52)
    with VideoFile(tmp_path / "a.mp4") as file:
        for wrong in (ramp(2).astype(np.float32), ramp(2)[0], ramp(2)[..., :2]):
            with pytest.raises(ValueError, match="expected uint8"):
                file.write(wrong)
        file.write(ramp(2))
        with pytest.raises(ValueError, match="got 16x48, expected 32x48"):
            file.write(ramp(2, height=16))


def test_a_contact_sheet_has_a_row_per_prompt(tmp_path: Path) -> None:
    sheet = ContactSheet()
    for level in range(20):
        sheet.add(0, 0, np.full((320, 480, 3), 10 * level, np.uint8))
    for level in range(2):
        sheet.add(0, 1, np.full((320, 480, 3), 100 + level, np.uint8))
    sheet.write(tmp_path / "sheet.png")
    (got,) = pictures(tmp_path / "sheet.png")
    height, width = 107, CELL
    assert got.shape == (2 * (height + GAP) + GAP, COLUMNS * (width + GAP) + GAP, 3)
    tops = [GAP, GAP + height + GAP]
    lefts = [GAP + i * (width + GAP) for i in range(COLUMNS)]
    first = [int(got[tops[0], left, 0]) for left in lefts]
    assert (first[0], first[-1]) == (0, 190)
    assert first == sorted(first)
    assert [int(got[tops[1], left, 0]) for left in lefts[:3]] == [100, 101, 255]


def test_small_frames_are_enlarged_and_no_frames_are_an_error(tmp_path: Path) -> None:
    sheet = ContactSheet()
    with pytest.raises(ValueError, match="got no frames"):
        sheet.write(tmp_path / "sheet.png")
    sheet.add(0, 0, np.zeros((64, 64, 3), np.uint8))
    sheet.write(tmp_path / "sheet.png")
    assert pictures(tmp_path / "sheet.png").shape[1:3] == (128 + 2 * GAP, 128 + 2 * GAP)


def test_a_video_becomes_a_gif(tmp_path: Path) -> None:
    write(tmp_path / "x.mp4", ramp(48, 32, 64))
    assert write_gif(tmp_path / "x.mp4", tmp_path / "a/x.gif", fps=4, width=128) == 12
    got = pictures(tmp_path / "a/x.gif")
    assert got.shape == (12, 64, 128, 3)
    levels = got.mean((1, 2, 3))
    assert np.all(np.diff(levels) > 0)
    assert (levels[0], levels[-1]) == (pytest.approx(40, abs=12), pytest.approx(220, abs=12))


def test_what_is_no_video_does_not_become_a_gif(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises((OSError, ValueError), match=r"x\.mp4"):
        write_gif(tmp_path / "x.mp4", tmp_path / "x.gif")
    assert not (tmp_path / "x.gif").exists()
