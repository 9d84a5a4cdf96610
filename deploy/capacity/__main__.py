# SPDX-License-Identifier: Apache-2.0
"""Prints how many sessions a GPU holds and what an hour of video costs: `python -m deploy.capacity`.

Projected from FLOPs, speeds and memory; measurements in results/gpu.json replace projections.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.command_line import exit_code
from benchmarks.results import ROOT, format_table, read_results
from deploy.autoscaling_simulator.report.tables import SECTION as SIMULATOR
from deploy.autoscaling_simulator.report.tables import sweep_tables, trace_table
from deploy.autoscaling_simulator.sim_config import CHUNK_PLAYS_S, MEASURED
from deploy.capacity.projection import FP8, FULL, GPUS, PRECISIONS, chunk_seconds, memory_of
from longlive_serve.config.presets import DECODERS, WindowConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor.memory_model import server_memory

RESULTS = ROOT / "results/autoscaling.json"
PROJECTED = "projected"
SECTION = "benchmarks.engines"
PRICE = 3.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPUCapacity:
    """Capacity of a GPU with a DiT precision and a decoder."""

    gpu: str
    precision: str
    decoder: str
    chunk_s: float
    max_by_memory: int | None
    """Sessions that fit into memory; None: unknown."""
    max_realtime: int
    """Sessions without late chunks."""
    max_admitted: int
    """Sessions that a server admits, with the default `max_utilization`."""
    source: str


def projected(gpu: str, precision: str, decoder: str) -> GPUCapacity:
    seconds = chunk_seconds(gpu, precision, decoder)
    memory = server_memory(
        FULL, dtype="bfloat16", decoder=decoder, fused_dit=True, fused_decoder=True, fp8=precision == FP8
    )
    max_by_memory, max_realtime = memory.max_sessions(memory_of(gpu)), int(CHUNK_PLAYS_S / seconds)
    max_admitted = max(
        int(ServeConfig().max_utilization * CHUNK_PLAYS_S / seconds), min(1, max_realtime)
    )  # the first session is always admitted
    return GPUCapacity(
        gpu=gpu,
        precision=precision,
        decoder=decoder,
        chunk_s=seconds,
        max_by_memory=max_by_memory,
        max_realtime=min(max_realtime, max_by_memory),
        max_admitted=min(max_admitted, max_by_memory),
        source=PROJECTED,
    )


def measured(path: Path = MEASURED) -> Iterator[GPUCapacity]:
    """The fastest backend per precision and decoder. Nothing if the full size was not measured."""
    run: dict[str, Any] = read_results(path).get(SECTION, {})
    if run.get("preset") != FULL.name:
        return
    name, _, _ = str(run["hardware"]).partition(",")
    gpu = next((gpu for gpu in GPUS if gpu.removesuffix(" 80 GB") in name), name)
    results: dict[tuple[str, str], dict[str, Any]] = {}
    for row in run["rows"]:
        key = FP8 if row["fp8"] else str(row["dtype"]), row["decoder"]
        if not row["baseline"] and (key not in results or row["fps"] > results[key]["fps"]):
            results[key] = row
    for (precision, decoder), row in results.items():
        live = row["live"]
        yield GPUCapacity(
            gpu=gpu,
            precision=precision,
            decoder=decoder,
            chunk_s=row["chunk_s"]["median"],
            max_by_memory=projected(gpu, precision, decoder).max_by_memory
            if gpu in GPUS and precision in PRECISIONS
            else None,
            max_realtime=live["sessions"],
            max_admitted=min(live["announced"], live["sessions"]),
            source=f"measured {run['date']}: {row['name']}",
        )


def rows(path: Path = MEASURED) -> list[GPUCapacity]:
    """All projections, replaced by measurements where available, and all other measurements."""
    results = {
        (gpu, precision, decoder): projected(gpu, precision, decoder)
        for gpu in GPUS
        for precision in PRECISIONS
        for decoder in DECODERS
    }
    results |= {(row.gpu, row.precision, row.decoder): row for row in measured(path)}
    return list(results.values())


def fleet_factor(path: Path = RESULTS) -> float:
    """GPU-hours of an autoscaled fleet relative to a perfect one, over a simulated day."""
    return float(read_results(path)["diurnal"]["gpu_hours_by_perfect"])


def capacity_table(rows: Sequence[GPUCapacity], price: float, factor: float) -> str:
    """`price`: per GPU-hour. `factor`: from `fleet_factor`."""
    columns = {
        "GPU": "{gpu}",
        "DiT": "{precision}",
        "decoder": "{decoder}",
        "ms a chunk": "{chunk_ms:.0f}",
        "frames/s": "{fps:.0f}",
        "sessions by memory": "{memory}",
        "keeps up with": "{max_realtime}",
        "admits": "{max_admitted}",
        "an hour of video, GPU full": "{cost}",
        f"in a fleet (x {factor:.2f})": "{fleet_cost}",
        "source": "{source}",
    }
    return format_table(columns, (vars(row) | _computed(row, price, factor) for row in rows))


def _computed(row: GPUCapacity, price: float, factor: float) -> dict[str, Any]:
    cost, fleet_cost = (
        f"{price * times / row.max_admitted:.2f}" if row.max_admitted else "-" for times in (1.0, factor)
    )
    speed = {"chunk_ms": 1e3 * row.chunk_s, "fps": WindowConfig().chunk_frames / row.chunk_s}
    return {
        **speed,
        "memory": "?" if row.max_by_memory is None else row.max_by_memory,
        "cost": cost,
        "fleet_cost": fleet_cost,
    }


def tables(price: float = PRICE) -> dict[str, str]:
    """The tables of docs/capacity.md by the name in their marks."""
    record = read_results(RESULTS)
    return {
        "capacity": capacity_table(rows(), price, fleet_factor()),
        "traces": trace_table(record),
        "sweep": sweep_tables(record[SIMULATOR]["sweep"]),
    }


def update_tables(page: str, tables: Mapping[str, str]) -> str:
    """Replace the tables of a page, each between `<!-- table NAME -->` and `<!-- end -->`."""
    for name, table in tables.items():
        begin, end = f"<!-- table {name} -->\n", "<!-- end -->"
        before, mark, rest = page.partition(begin)
        _, mark_after, after = rest.partition(end)
        if not (mark and mark_after):
            raise ValueError(f"page: got no marks {begin.strip()} and {end}, expected both")
        page = f"{before}{begin}\n{table}\n\n{end}{after}"
    return page


@exit_code(KeyError)
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.capacity", description=__doc__)
    parser.add_argument("--price", type=float, default=PRICE, help="per GPU-hour (default: %(default).2f)")
    parser.add_argument(
        "--page", type=Path, metavar="MD", help="write the tables to this page instead (docs/capacity.md)"
    )
    args = parser.parse_args(argv)
    if args.page is None:
        print(capacity_table(rows(), args.price, fleet_factor()))
    else:
        args.page.write_text(update_tables(args.page.read_text(encoding="utf-8"), tables(args.price)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
