# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what a viewer notices, and that it is noticed against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import __main__ as benchmark
from benchmarks.serving.viewer import Seen, Viewer, Watching
from longlive_client.request_tracker import StreamedChunk

WATCHING = Watching(url="", prompts=["a", "b"], seconds=10, switch_every=0, fps=16)


def chunk(number: int, arrived: float, *, prompt_index: int = 0, frames: int = 12) -> StreamedChunk:
    pictures = np.zeros((frames if number else 9, 2, 2, 3), np.uint8)
    first = 12 * number - 3 if number else 0
    return StreamedChunk(frames=pictures, first_frame=first, prompt_index=prompt_index, arrived=arrived)


def seen_by(*chunks: StreamedChunk, asked: dict[int, float] | None = None) -> Seen:
    viewer = Viewer(WATCHING, 0)
    viewer._asked = asked or {}
    for one in chunks:
        viewer._note(one, 100.0)
    return viewer._seen


def test_a_viewer_whose_chunks_come_in_time_sees_no_stall() -> None:
    seen = seen_by(*(chunk(number, 100.5 + 0.75 * number) for number in range(9)))
    assert (seen.first_frame, seen.chunks, seen.frames, seen.lasted) == (0.5, 9, 105, 6.0)
    assert not seen.stalls
    assert seen.disordered == 0


def test_a_late_chunk_is_one_stall_and_playback_goes_on_from_it() -> None:
    seen = seen_by(chunk(0, 100.0), chunk(1, 101.0), chunk(2, 101.75), chunk(3, 103.0))
    assert seen.stalls == [pytest.approx(0.25), pytest.approx(0.5)]


def test_missing_and_repeated_frames_are_noticed() -> None:
    assert seen_by(chunk(0, 100.0), chunk(2, 100.1), chunk(3, 100.2)).disordered == 1
    assert seen_by(chunk(0, 100.0), chunk(1, 100.1), chunk(1, 100.2)).disordered == 1
    assert seen_by(chunk(1, 100.0)).disordered == 1


def test_a_switch_lasts_until_the_first_frame_of_its_prompt() -> None:
    chunks = [chunk(0, 100.0), chunk(1, 100.4), chunk(2, 100.9, prompt_index=1), chunk(3, 101.0, prompt_index=1)]
    assert seen_by(*chunks, asked={1: 100.1}).switches == [pytest.approx(0.8)]


def test_a_place_in_the_queue_is_no_picture() -> None:
    seen = seen_by(chunk(1, 100.0, frames=0))
    assert seen.queued
    assert (seen.chunks, seen.first_frame) == (0, None)
    figures = benchmark.summary([seen, Seen(refused="full")], 16)
    assert (figures["viewers"], figures["watched"], figures["queued"], figures["refused"]) == (2, 0, 1, 1)
    assert figures["first_frame_s"] is None


def test_throughput_counts_the_time_of_those_who_watch_one_after_the_other() -> None:
    first = seen_by(chunk(0, 100.0), chunk(1, 100.75))
    second = seen_by(chunk(0, 101.0), chunk(1, 101.75))
    assert benchmark.summary([first, second], 16)["frames_per_s"] == pytest.approx(42 / 1.75)


def test_against_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "serve.toml"
    config.write_text('preset = "tiny"\nslots = 2\nmax_waiting = 0\n')
    command = f"--serve --config {config} --viewers 1,3 --seconds 4 --switch-every 0.6 --json {tmp_path}/b.json"
    assert benchmark.main([*command.split(), "--plot", str(tmp_path / "b.png")]) == 0
    whole = json.loads((tmp_path / "b.json").read_text(encoding="utf-8"))
    record = whole["client.benchmark"]
    one, three = record["runs"]
    assert whole["sessions_admitted"] == 2
    assert whole["deadline_misses"] == one["deadline_misses"] + three["deadline_misses"]
    assert (one["watched"], one["refused"]) == (1, 0)
    assert (three["watched"], three["refused"]) == (2, 1)
    assert one["announced_capacity"] == 2
    assert one["switch_s"]["p50"] > 0
    assert 0 < one["real_time_factor"] < 2.5  # paced: a few chunks ahead of 4 seconds
    assert record["command"].startswith("python -m benchmarks.serving --serve")
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")
    assert "viewers" in capsys.readouterr().out
