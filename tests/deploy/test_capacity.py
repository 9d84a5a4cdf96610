# SPDX-License-Identifier: Apache-2.0
"""Sessions on a GPU and their price: the projection, what was measured in its place, and the page that shows both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("simpy", reason="needs the extra `deploy`")

from benchmarks.engines.hardware import flops
from deploy.capacity import __main__ as capacity
from deploy.capacity import projection
from longlive_serve.config.presets import TINY, WAN

PAGE = Path(__file__).parents[2] / "docs/capacity.md"


def make_check(name: str, decoder: str, fps: float, **facts: Any) -> dict[str, Any]:
    """A row as the benchmark writes it."""
    plain = {"name": name, "decoder": decoder, "fps": fps, "dtype": "bfloat16", "fp8": False, "baseline": False}
    live = {"sessions": 4, "announced": 3}
    return plain | {"chunk_s": {"median": 12 / fps}, "live": live} | facts


def written(path: Path, hardware: str, *rows: dict[str, Any], preset: str = "longlive-1.3b") -> Path:
    section = {"preset": preset, "hardware": hardware, "date": "2027-01-01", "rows": rows}
    path.write_text(json.dumps({capacity.SECTION: section}), encoding="utf-8")
    return path


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert capacity.main([]) == 0
    page = PAGE.read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() in page
    assert capacity.update_tables(page, capacity.tables()) == page, "python -m deploy.capacity --page docs/capacity.md"


def test_projections_count_the_operations_that_the_benchmark_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = projection.KernelSpeeds(linear=1.0, attention=1.0, layer_bytes=0, launches=0)
    monkeypatch.setattr(projection, "wave_utilization", lambda tiles: 1.0)
    size = projection.FULL.window.chunk, projection.FULL.window.window
    counted = flops.dit_pass(projection.FULL, *size) / projection.FULL.dit.num_layers
    assert projection.layer_seconds(speeds) == pytest.approx(counted, rel=1e-6)
    assert projection.DECODER[WAN].operations == pytest.approx(flops.decoder_chunk(projection.FULL, WAN), rel=1e-2)


def test_a_wave_that_is_not_full_takes_as_long() -> None:
    assert projection.wave_utilization(projection.SMS) == projection.wave_utilization(3 * projection.SMS) == 1
    assert projection.wave_utilization(projection.SMS + 1) == pytest.approx(0.5, abs=0.01)
    assert projection.product_tiles(4680, 1536) == 37 * 6


def test_a_projection_adds_up() -> None:
    """Bfloat16 on an H200, by hand: 1.68 waves of a product of width 1536 are 2, and so on."""
    full = 790e12 / (2048 / (16 * 132))
    waves = {1536: 222 / 264, 4608: 666 / 792, 8960: 1295 / 1320}
    products = 1536 * 4608 / waves[4608] + 3 * 1536**2 / waves[1536]
    products += 1536 * 8960 * (1 / waves[8960] + 1 / waves[1536])
    attention = 4 * 4680 * (12 * 1560 + 512) * 1536 / (667e12 * 444 / 528)
    computed = 149 * (2 * 4680 * products / full + attention) + 40.65 / 430
    moved, rest = 149 * 484e6 + 45e9, 2130 * 1.5e-6 + 0.003
    assert projection.chunk_seconds("H200", "bfloat16", WAN) == pytest.approx(computed + moved / 3.6e12 + rest)
    slowdown = computed * 989 / 362 + moved / (0.75 * 0.864e12)
    assert projection.chunk_seconds("L40S", "bfloat16", WAN) == pytest.approx(slowdown + rest)
    fast, slow, small = (
        capacity.projected(gpu, precision, decoder)
        for gpu, precision, decoder in (("H200", "fp8", TINY), ("L40S", "fp8", TINY), ("RTX 4090", "fp8", WAN))
    )
    assert (fast.max_realtime, fast.max_admitted) == (4, 3)
    assert (slow.max_realtime, slow.max_admitted) == (1, 1)  # the first one is always admitted
    assert (small.max_by_memory, small.max_realtime, small.max_admitted) == (0, 0, 0)


def test_what_was_measured_takes_the_place_of_a_projection(tmp_path: Path) -> None:
    rows = (
        make_check("eager baseline", WAN, 99.0, baseline=True),
        make_check("torch", WAN, 20.0),
        make_check("fused", WAN, 30.0),
    )
    path = written(tmp_path / "gpu.json", "NVIDIA H200, 140 GiB, 132 multiprocessors", *rows)
    results = capacity.rows(path)
    assert len(results) == len(capacity.rows(tmp_path / "none.json"))
    (measured,) = [one for one in results if one.source != capacity.PROJECTED]
    assert (measured.gpu, measured.precision, measured.decoder) == ("H200", "bfloat16", WAN)
    assert (measured.chunk_s, measured.max_realtime, measured.max_admitted) == (0.4, 4, 3)
    assert measured.source == "measured 2027-01-01: fused"
    memory = measured.max_by_memory
    line = f"| H200 | bfloat16 | wan | 400 | 30 | {memory} | 4 | 3 | 1.00 | 1.50 | measured 2027-01-01: fused |"
    assert line in capacity.capacity_table(results, 3.0, 1.5)


def test_another_gpu_gets_lines_of_its_own(tmp_path: Path) -> None:
    path = written(tmp_path / "gpu.json", "NVIDIA B200, 180 GiB", make_check("fused fp8 tiny", TINY, 150.0, fp8=True))
    last = capacity.rows(path)[-1]
    assert (last.gpu, last.precision, last.max_by_memory) == ("NVIDIA B200", "fp8", None)
    toy = written(tmp_path / "toy.json", "2 CPU cores", make_check("torch", WAN, 5.0), preset="tiny")
    assert list(capacity.measured(toy)) == []


def test_a_page_without_a_place_for_a_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    assert capacity.main(["--page", str(page)]) == 1
    assert "got no marks <!-- table capacity -->" in capsys.readouterr().err
    page.write_text("".join(f"<!-- table {name} -->\nold\n<!-- end -->\n" for name in capacity.tables()))
    assert capacity.main(["--page", str(page), "--price", "6"]) == 0
    assert "old" not in page.read_text(encoding="utf-8")
    assert capacity.capacity_table(capacity.rows(), 6.0, capacity.fleet_factor()) in page.read_text(encoding="utf-8")
