# SPDX-License-Identifier: Apache-2.0
"""The benchmark: what a viewer notices, and that it is noticed against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.serving import __main__ as benchmark
from benchmarks.serving.viewer import Viewer, ViewerConfig, ViewerStats
from longlive_client.wire import StreamedChunk

CONFIG = ViewerConfig(url="", prompts=["a", "b"], seconds=10, switch_interval=0, fps=16)


def chunk(index: int, arrived: float, *, prompt_index: int = 0, frames: int = 12) -> StreamedChunk:
    pictures = np.zeros((frames if index else 9, 2, 2, 3), np.uint8)
    first = 12 * index - 3 if index else 0
    return StreamedChunk(frames=pictures, first_frame=first, prompt_index=prompt_index, arrived=arrived)


def stats_of(*chunks: StreamedChunk, requested_at: dict[int, float] | None = None) -> ViewerStats:
    viewer = Viewer(CONFIG, 0)
    viewer._requested_at = requested_at or {}
    for one in chunks:
        viewer._record(one, 100.0)
    return viewer._stats


def test_a_viewer_whose_chunks_come_in_time_sees_no_stall() -> None:
    stats = stats_of(*(chunk(index, 100.5 + 0.75 * index) for index in range(9)))
    assert (stats.first_frame_latency, stats.chunks, stats.frames, stats.duration) == (0.5, 9, 105, 6.0)
    assert not stats.stalls
    assert stats.out_of_order == 0


def test_a_late_chunk_is_one_stall_and_playback_goes_on_from_it() -> None:
    stats = stats_of(chunk(0, 100.0), chunk(1, 101.0), chunk(2, 101.75), chunk(3, 103.0))
    assert stats.stalls == [pytest.approx(0.25), pytest.approx(0.5)]


def test_missing_and_repeated_frames_are_noticed() -> None:
    assert stats_of(chunk(0, 100.0), chunk(2, 100.1), chunk(3, 100.2)).out_of_order == 1
    assert stats_of(chunk(0, 100.0), chunk(1, 100.1), chunk(1, 100.2)).out_of_order == 1
    assert stats_of(chunk(1, 100.0)).out_of_order == 1


def test_a_switch_lasts_until_the_first_frame_of_its_prompt() -> None:
    chunks = [chunk(0, 100.0), chunk(1, 100.4), chunk(2, 100.9, prompt_index=1), chunk(3, 101.0, prompt_index=1)]
    assert stats_of(*chunks, requested_at={1: 100.1}).switch_latencies == [pytest.approx(0.8)]


def test_a_place_in_the_queue_is_no_picture() -> None:
    stats = stats_of(chunk(1, 100.0, frames=0))
    assert stats.queued
    assert (stats.chunks, stats.first_frame_latency) == (0, None)
    figures = benchmark.summarize([stats, ViewerStats(refused="full")], 16)
    assert (figures["viewers"], figures["watched"], figures["queued"], figures["refused"]) == (2, 0, 1, 1)
    assert figures["first_frame_s"] is None


def test_throughput_counts_the_time_of_those_who_watch_one_after_the_other() -> None:
    first = stats_of(chunk(0, 100.0), chunk(1, 100.75))
    second = stats_of(chunk(0, 101.0), chunk(1, 101.75))
    assert benchmark.summarize([first, second], 16)["frames_per_s"] == pytest.approx(42 / 1.75)


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
