# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the backends, at toy size for real: what it says, writes and refuses."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.engines import __main__ as command
from benchmarks.engines import check, live, run
from benchmarks.engines.hardware import flops
from benchmarks.engines.hardware.attention_table import exact
from benchmarks.engines.record import top_level_results
from benchmarks.engines.rows import BASELINE
from benchmarks.engines.show import plot
from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.scheduler import SECOND
from tests.conftest import ExportedGraphs
from tests.support.tolerance import Float64, error

ROOT = Path(__file__).parents[2]
TOY = PRESETS["tiny"]
QUICK = ["--device", "cpu", "--preset", "tiny", "--chunks", "4", "--warmup", "0", "--live-seconds", "0.2"]
BARE_MACHINE = """
import importlib.metadata, runpy, sys
for name in ("ftfy", "av", "tritonclient", "matplotlib", "onnxruntime", "grpc"):
    sys.modules[name] = None
found = importlib.metadata.version
def version(name):
    assert "longlive" not in name
    return found(name)
importlib.metadata.version = version
runpy.run_module("benchmarks.engines", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of a real run, on a machine that has nothing but torch and what else measuring needs."""
    path = tmp_path_factory.mktemp("bench") / "gpu.json"
    path.write_text('{"another": {"section": 1}}')
    arguments = [*QUICK, "--max-sessions", "1", "--rows", "torch", BASELINE, "fused", "torch tiny"]
    arguments += ["--no-flex", "--check", "--json", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BARE_MACHINE, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text(encoding="utf-8")) | {"printed": done.stdout}


@pytest.fixture(scope="module")
def record(whole: dict[str, Any]) -> dict[str, Any]:
    section: dict[str, Any] = whole["benchmarks.engines"]
    return section


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for part in value:
            yield from numbers(part)
    elif isinstance(value, int | float):
        yield value


def test_a_run_says_what_it_measured_and_where(whole: dict[str, Any], record: dict[str, Any]) -> None:
    assert whole["another"] == {"section": 1}
    assert record.keys() >= {"command", "date", "hardware", "versions", "preset", "roofline", "attention", "figures_of"}
    assert record["complete"]
    assert [row["name"] for row in record["rows"]] == ["torch", BASELINE, "torch tiny"], "in the order asked for"
    assert record["skipped"] == {"fused": "backend fused on cpu: its kernels need a GPU"}
    assert not record["failed"]
    assert all(math.isfinite(number) for number in numbers(record))
    assert "new prompt" in whole["printed"]


def test_each_row_is_compared_with_torch(whole: dict[str, Any], record: dict[str, Any]) -> None:
    checks = {row["name"]: row["check"] for row in record["rows"]}
    for found in checks.values():
        assert len(found["latents_off"]) == 6
        assert found["same_twice"]
    assert set(checks["torch"]["latents_off"]) == {0.0}
    assert checks["torch"]["frames_off"] == checks["torch tiny"]["frames_off"] == 0
    assert 0 < max(checks[BASELINE]["latents_off"]) < 1e-3
    assert "latents 0 % off torch's (0 % in the last chunk), frames 0 of 255; bitwise reproducible" in whole["printed"]


@pytest.mark.parametrize("broken", ["other", "nan"])
def test_a_row_that_computes_something_else_fails(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    size = (check.CHUNKS, TOY.window.chunk, 16, TOY.latent_height, TOY.latent_width)
    latents = torch.full(size, math.nan) if broken == "nan" else torch.randn(size)
    expected = check.make_video
    monkeypatch.setattr(run, "make_video", lambda runner: expected(runner)._replace(latents=latents))
    monkeypatch.setattr(run, "measure_roofline", lambda *_: {})
    monkeypatch.setattr(run, "measure_attention", lambda *_: {})
    assert command.main([*QUICK, "--check", "--rows", "torch", "--max-sessions", "1"]) == 1
    printed = capsys.readouterr().out
    assert "failed: torch: WrongResultError: the first chunk's latents: got a relative error of" in printed


def test_the_figures_of_a_row_agree_with_each_other(record: dict[str, Any]) -> None:
    for row in record["rows"]:
        phases = [row["phases_s"][phase] for phase in ("denoise", "kv_cache_update", "decode", "host")]
        assert sum(phase["p10"] for phase in phases) < row["chunk_s"]["p90"]
        assert row["chunk_s"]["p10"] < sum(phase["p90"] for phase in phases)
        assert row["fps"] == pytest.approx(12 / row["chunk_s"]["median"])
        assert row["dit_fps"] == pytest.approx(12 / row["dit_s"]["median"])
        assert row["dit_fps"] > row["fps"]
        assert row["chunk_s"]["count"] == 4
        assert row["switch_s"]["p95"] >= row["switch_s"]["median"] > row["recache_s"]["median"]
        assert row["live"]["sessions"] in (0, 1)
        first = row["live"]["runs"][0]
        assert first["chunks"] or first["misses"] == 1, "who has seen nothing counts, however busy the machine"
        decode = flops.decoder_chunk(TOY, row["decoder"]) / row["phases_s"]["decode"]["median"]
        share = decode / record["roofline"]["flops"]["float32"]
        assert row["of_roofline"]["decode"] == pytest.approx(share)


def test_a_session_takes_what_its_tensors_do(record: dict[str, Any]) -> None:
    rows = {row["name"]: row["session_bytes"] for row in record["rows"]}
    window = 12 * TOY.tokens_per_frame * TOY.dit.dim * 4
    assert rows["torch"]["slot"] == rows[BASELINE]["slot"] == 2 * TOY.dit.num_layers * window
    assert rows["torch"]["held"] > rows["torch tiny"]["held"] > 0


def test_the_figures_on_top_are_those_of_our_fastest_engines(whole: dict[str, Any], record: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in record["rows"]}
    assert record["figures_of"] == {"full_vae": "torch", "tiny_vae": "torch tiny"}
    assert whole["fps_full_vae"] == rows["torch"]["fps"]
    assert whole["fps_tiny_vae"] == rows["torch tiny"]["fps"]
    assert whole["speedup_vs_eager"] == pytest.approx(rows["torch"]["fps"] / rows[BASELINE]["fps"])
    assert whole["first_frame_s"] == rows["torch"]["first_frame_s"]["median"]
    assert whole["switch_p95_s"] == rows["torch"]["switch_s"]["p95"]
    assert whole["live_sessions_full_vae"] == rows["torch"]["live"]["sessions"]
    assert whole["live_sessions_tiny_vae"] == rows["torch tiny"]["live"]["sessions"]
    assert whole["dit_fps_bf16"] is whole["dit_fps_fp8"] is None  # nothing ran in these
    in_fp8 = [row | {"fp8": True} if row["name"] == "torch" else row for row in record["rows"]]
    assert top_level_results(in_fp8)["speedup_vs_eager"] is None, "FP8 is not compared with more bits"
    assert top_level_results(in_fp8)["speedup_vs_eager_fp8"] == whole["speedup_vs_eager"]
    in_bf16 = [row | {"dtype": "bfloat16"} for row in record["rows"]]
    assert top_level_results(in_bf16)["dit_fps_bf16"] == max(rows[name]["dit_fps"] for name in ("torch", "torch tiny"))
    assert all(value is None for value in top_level_results([]).values())


def test_a_record_becomes_a_picture(record: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib (extra `bench`)")
    plot(record, tmp_path / "new/gpu.png")
    assert (tmp_path / "new/gpu.png").stat().st_size > 1000


def test_a_picture_without_matplotlib_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        command.main([*QUICK, "--plot", "gpu.png"])
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err


def test_what_was_exported_is_measured_beside_torch(
    exported: ExportedGraphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, graphs = tmp_path / "gpu.json", str(exported("tiny", "base"))
    folders = ["--graphs", graphs, "--tensorrt-engines", graphs]
    assert command.main([*QUICK, "--max-sessions", "1", "--rows", "torch", *folders, "--json", str(path)]) == 0
    record = json.loads(path.read_text(encoding="utf-8"))["benchmarks.engines"]
    assert [(row["name"], row["backend"]) for row in record["rows"]] == [
        ("torch", "torch"),
        ("onnxruntime", "onnxruntime+torch"),
    ]
    assert list(record["skipped"]) == ["tensorrt"]
    assert graphs in record["skipped"]["tensorrt"]
    assert "onnxruntime" in record["versions"]
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "turbo"], "invalid choice: 'turbo'"),
        (["--chunks", "200"], "more chunks than a video can have"),
        (["--max-sessions", "0"], "got 0, expected 1 or more"),
        (["--preset", "demo"], "invalid choice: 'demo'"),
        (["--graphs", "nowhere"], "--graphs nowhere: no manifest.json found"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([*QUICK, *arguments])
    assert complaint in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda"])
    assert "torch finds no GPU" in capsys.readouterr().err


@pytest.fixture
def rows_without_work(monkeypatch: pytest.MonkeyPatch, record: dict[str, Any]) -> dict[str, BaseException]:
    """Rows come from the real record; those named here raise instead."""
    errors: dict[str, BaseException] = {}

    def measure(self: run.Run, row: Any) -> dict[str, Any]:
        if row.name in errors:
            raise errors[row.name]
        return next(known for known in record["rows"] if known["name"] == row.name)

    monkeypatch.setattr(run.Run, "_measure", measure)
    monkeypatch.setattr(run, "measure_roofline", lambda *_: record["roofline"])
    monkeypatch.setattr(run, "measure_attention", lambda *_: record["attention"])
    return errors


def test_ctrl_c_shows_what_has_been_measured(
    rows_without_work: dict[str, BaseException], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows_without_work["torch"] = KeyboardInterrupt()
    path = tmp_path / "gpu.json"
    assert command.main([*QUICK, "--json", str(path)]) == 130
    printed = capsys.readouterr()
    assert BASELINE in printed.out
    assert "torch tiny" not in printed.out
    assert "stopped" in printed.err
    assert not json.loads(path.read_text(encoding="utf-8"))["benchmarks.engines"]["complete"]
    assert logging.getLogger("longlive_serve").level == logging.NOTSET, "whoever runs it in a process goes on logging"


def test_a_row_that_fails_leaves_the_others(
    rows_without_work: dict[str, BaseException], capsys: pytest.CaptureFixture[str]
) -> None:
    rows_without_work["torch"] = RuntimeError("out of memory")
    rows_without_work["torch tiny"] = ImportError("no module triton")
    assert command.main([*QUICK, "--rows", BASELINE, "torch", "torch tiny"]) == 1
    printed = capsys.readouterr().out
    assert "failed: torch: RuntimeError: out of memory" in printed
    assert "skipped: torch tiny: no module triton" in printed
    del rows_without_work["torch"]
    assert command.main([*QUICK, "--rows", BASELINE, "torch", "torch tiny"]) == 0
    assert command.main([*QUICK, "--rows", "torch tiny"]) == 1


def test_everyone_is_admitted_and_lateness_has_a_sign() -> None:
    scheduler = live.UnboundedScheduler(slots=3, cost=SECOND)  # each chunk takes longer than it plays
    for name in "abc":
        scheduler.add(name, 0, fps=16, max_chunks_ahead=1)
    assert len(scheduler.admit(0)) == 3
    assert scheduler.done("a", SECOND, 9, SECOND) == 0  # playback begins; the next one is due 0.75 s later
    assert scheduler.done("a", 3 * SECOND // 2, 12, SECOND // 2) == 0
    assert scheduler.done("a", 3 * SECOND, 12, SECOND) == SECOND // 2
    assert scheduler.lateness == [-0.25, 0.5]
    assert scheduler.deadline_misses == 1


def test_sessions_are_added_until_chunks_come_late_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    misses = iter([0, 1, 0, 2, 1])

    def run_live(runner: Any, config: Any, chunk_s: float, seconds: float, sessions: int) -> dict[str, Any]:
        return {"sessions": sessions, "misses": next(misses)}

    monkeypatch.setattr(live, "run_live", run_live)
    told: list[str] = []
    config = ServeConfig(slots=8)
    prepared: list[int] = []
    runner: Any = SimpleNamespace(prepare=prepared.append)
    figures = live.measure_live(runner, config, 0.25, 1.0, 8, told.append)
    assert prepared == [1, 2, 3], "slots that nobody uses cost nothing"
    assert [run["sessions"] for run in figures["runs"]] == [1, 2, 2, 3, 3]
    assert (figures["sessions"], figures["most_tried"], figures["announced"]) == (2, 3, 2)
    assert told[-1] == "3 live sessions"


@pytest.mark.numeric
def test_the_error_of_attention_is_against_all_heads() -> None:
    q, k, v = (torch.randn(1, 3, length, 8) for length in (5, 7, 7))
    weights = (q.double() @ k.double().transpose(2, 3) / 8**0.5).softmax(-1)
    with Float64():
        assert error(exact(q, k, v), weights @ v.double()) < 1e-12
