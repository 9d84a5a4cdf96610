# SPDX-License-Identifier: Apache-2.0
"""The trials, briefly: what they find when they run for long is in results/serving.json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.serving import perf_analyzer
from longlive_client.video_stream import StreamedChunk
from stress import chaos, fuzz, mtls_fleet, soak
from stress.viewers import ViewerLog

TINY = 'preset = "tiny"\nweights = "random"\nslots = 4\n'


def test_wrong_requests_beside_live_sessions(tmp_path: Path) -> None:
    record = tmp_path / "serving.json"
    assert fuzz.main(["--requests", "1000", "--seed", "7", "--json", str(record)]) == 0
    assert json.loads(record.read_text(encoding="utf-8")).items() >= {"fuzz_requests": 1000, "fuzz_crashes": 0}.items()


def test_the_same_seed_makes_the_same_requests() -> None:
    requests = [fuzz.Mutator(3, b"x" * 100, ["live"]).make_request() for _ in range(2)]
    assert requests[0].tensors.keys() == requests[1].tensors.keys()
    assert requests[0].flags == requests[1].flags
    kinds = {tuple(fuzz.Mutator(n, b"x" * 100, ["live"]).make_request().tensors) for n in range(200)}
    assert len(kinds) > 20


def test_viewers_come_and_go_for_a_while(tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_text(TINY)
    record = tmp_path / "serving.json"
    options = ["--minutes", "0.2", "--viewers", "2", "--session-seconds", "4", "--switch-every", "1", "--fps", "32"]
    soak.main([*options, "--config", str(config), "--json", str(record)])
    figures = json.loads(record.read_text(encoding="utf-8"))["trials.soak"]
    # Memory and deadlines are for a longer run on a quiet machine to judge.
    assert not [text for text in soak.failures(figures) if not text.startswith(("memory", "deadline", "stalls"))]
    assert figures["sessions"] >= 4
    assert figures["prompt_switches"] >= 4


needs_haproxy = pytest.mark.skipif(
    shutil.which("haproxy", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin") is None,
    reason="needs haproxy (Debian, Ubuntu: apt-get install haproxy)",
)


@needs_haproxy
def test_viewers_lose_no_frame_while_servers_die(tmp_path: Path) -> None:
    options = ["--preset", "tiny", "--weights", "random", "--servers", "2", "--viewers", "4", "--victims", "1"]
    options += ["--kills", "4", "--fps", "8", "--every", "2", "4", "--compare", "1", "--seed", "1"]
    assert chaos.main([*options, "--json", str(tmp_path / "serving.json")]) == 0
    record = json.loads((tmp_path / "serving.json").read_text(encoding="utf-8"))
    assert (record["chaos_kills"], record["chaos_lost_frames"]) == (4, 0)
    assert record["trials.chaos"]["resumed"] > 0


@needs_haproxy
def test_a_fleet_keeps_strangers_out_and_viewers_happy(tmp_path: Path) -> None:
    record = tmp_path / "serving.json"
    assert mtls_fleet.main(["--preset", "tiny", "--weights", "random", "--fps", "8", "--json", str(record)]) == 0
    figures = json.loads(record.read_text(encoding="utf-8"))["trials.fleet"]
    assert (figures["servers"], figures["viewers"]) == (3, 12)
    assert sum(figures["live_by_server"]) == figures["found_over_another_connection"] == 12
    assert max(figures["live_by_server"]) <= 6
    assert len(figures["turned_away"]) == 6
    assert figures["resumed_after_kill"] > 0
    assert figures["resumed_after_drain"] >= figures["drained_with_sessions"] > 0
    assert figures["drain_exit_s"] > 0


def test_what_a_fleet_must_not_do_is_said() -> None:
    good = dict.fromkeys(("lost_frames", "repeated_frames", "sessions_left", "shared_memory_left", "processes_left"), 0)
    fine = good | {"turned_away": {"no token": True}, "found_over_another_connection": 2, "viewers": 2}
    assert mtls_fleet.failures(fine) == []
    for change in ({"turned_away": {"no token": False}}, {"found_over_another_connection": 1}, {"lost_frames": 1}):
        assert len(mtls_fleet.failures(fine | change)) == 1


def test_how_long_the_picture_stood_still() -> None:
    arrived = [0.0, 0.5, 4.0]  # 9 frames and 12 at 8 fps play for 2.625 s
    chunks = [_chunk(first, count, at) for (first, count), at in zip([(0, 9), (9, 12), (21, 12)], arrived, strict=True)]
    assert mtls_fleet.longest_stall(chunks, 8) == 4.0 - 2.625
    assert mtls_fleet.longest_stall(chunks[:2], 8) == 0.0


def test_a_lost_and_a_repeated_frame_are_noticed() -> None:
    log = ViewerLog(index=0)
    frames = [(0, 9), (9, 12), (33, 12), (33, 12)]
    for first, count in frames:
        log.add(_chunk(first, count), resumed=0)
    assert (log.lost, log.repeated) == (12, 12)


def _chunk(first: int, count: int, arrived: float = 0.0) -> StreamedChunk:
    pictures = np.zeros((count, 2, 2, 3), np.uint8)
    return StreamedChunk(frames=pictures, first_frame=first, prompt_index=0, seconds=1.0, arrived=arrived)


def test_perf_analyzer_gets_sequences_that_switch_prompts() -> None:
    sequences = perf_analyzer.input_data()["data"]
    assert all(len({step["PROMPT"][0] for step in steps if "PROMPT" in step}) > 1 for steps in sequences)
    assert all("OPTIONS" in steps[0] and "OPTIONS" not in steps[1] for steps in sequences)


def test_the_page_on_performance_shows_the_measured_figures() -> None:
    record = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    page = (Path(__file__).parents[2] / "docs/performance.md").read_text(encoding="utf-8")
    assert tables.viewers_table(record["client.benchmark"]["runs"]) in page
    assert tables.stress_table(record) in page


def test_the_figures_that_others_look_up_stand_on_top() -> None:
    record = json.loads(tables.RESULTS.read_text(encoding="utf-8"))
    assert record.keys() >= {
        "sessions_admitted", "deadline_misses", "chaos_kills", "chaos_lost_frames", "soak_minutes",
        "soak_rss_slope_mb_per_h", "fuzz_requests", "fuzz_crashes", "perf_analyzer_chunks_per_s",
        "benchmark_chunks_per_s",
    }  # fmt: skip
