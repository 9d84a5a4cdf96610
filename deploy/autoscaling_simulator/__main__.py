# SPDX-License-Identifier: Apache-2.0
"""Simulates the autoscaling policy on a day, bursts and a flash crowd: `python -m deploy.autoscaling_simulator`.

Prints waiting times, refused viewers, stalled videos and GPU-hours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.command_line import at_least, exit_code
from benchmarks.results import Measurement, cpu, versions
from deploy.autoscaling_simulator import sweep
from deploy.autoscaling_simulator.arrivals import TRACES
from deploy.autoscaling_simulator.policy import DEFAULT_PATH, Policy
from deploy.autoscaling_simulator.report.plot import plot
from deploy.autoscaling_simulator.report.simulate import SimulationResult, simulate, with_enough_replicas
from deploy.autoscaling_simulator.report.tables import SECTION, sweep_tables, trace_table
from deploy.autoscaling_simulator.sim_config import SimConfig, capacity
from longlive_serve.config.presets import DECODERS, WAN

CODE = ("deploy/autoscaling_simulator", "deploy/policy.toml")
EXAMPLES = """\
examples
  python -m deploy.autoscaling_simulator --peak-sessions 1000                          # three traces, a few seconds
  python -m deploy.autoscaling_simulator --trace flash_crowd --cold-start 1 1.5 3      # the effect of faster starts
  python -m deploy.autoscaling_simulator --policy mine.toml --trace burst              # your own thresholds
  python -m deploy.autoscaling_simulator --fixed 400 --peak-sessions 1000              # a fleet of constant size
  python -m deploy.autoscaling_simulator --sweep                                # the traces, then other thresholds

A pod has one GPU. All results depend on the number of sessions per GPU: it is read from results/gpu.json if the
benchmark ran on a GPU (python -m benchmarks.engines), otherwise it is a projection. The other assumptions (session
lengths, cold starts, failures) are in deploy/autoscaling_simulator/sim_config.py."""


@exit_code()
def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    measurement = Measurement.begin(SECTION, argv)
    config, source = _config(args)
    policy = Policy.from_toml(args.policy)
    runs, sweep_results = _run(args, config, policy)
    traces = {name: run.metrics for name, run in runs.items()}
    run_config = {
        "peak_sessions": args.peak_sessions,
        "seed": args.seed,
        "capacity_from": source,
        "policy": _policy(args, policy, config),
        "world": config,
        **({"sweep_seeds": sweep.SEEDS, "sweep": sweep_results} if sweep_results else {}),
    }
    print(trace_table(traces))
    if sweep_results:
        print(f"\n{sweep_tables(sweep_results)}")
    if args.json is not None:
        args.json.unlink(missing_ok=True)  # drop the traces of an earlier run
        hardware = f"{cpu()}; simulated, no GPU"
        measurement.write(
            args.json,
            run_config,
            code=CODE,
            hardware=hardware,
            versions=versions("simpy", "numpy"),
            section=SECTION,
            top_level=traces,
        )
    if args.plot is not None:
        plot(runs, args.plot)
    return 0


def _config(args: argparse.Namespace) -> tuple[SimConfig, str]:
    """The simulation's config, and the source of its capacity."""
    if args.capacity:
        sessions, source = args.capacity, "given"
    else:
        sessions, source = capacity(args.decoder)
    print(f"{sessions} live sessions on a GPU ({source})", file=sys.stderr)
    least, likely, most = (60 * minutes for minutes in args.cold_start)
    if not 0 <= least <= likely <= most:
        raise ValueError(f"--cold-start: got {args.cold_start}, expected minimum, most likely and maximum, in order")
    return SimConfig(capacity=sessions, cold_start_s=(least, likely, most), mtbf_h=args.mtbf), source


def _policy(args: argparse.Namespace, policy: Policy, config: SimConfig) -> Policy:
    return policy.fixed(args.fixed) if args.fixed else with_enough_replicas(policy, args.peak_sessions, config.capacity)


def _run(
    args: argparse.Namespace, config: SimConfig, policy: Policy
) -> tuple[dict[str, SimulationResult], dict[str, list[dict[str, Any]]]]:
    """The results by trace, and the rows of the sweep by table."""
    names = args.trace or list(TRACES)
    runs: dict[str, SimulationResult] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for name in names:
            task = progress.add_task(name, total=TRACES[name].seconds)
            runs[name] = simulate(
                name,
                config=config,
                policy=_policy(args, policy, config),
                peak=args.peak_sessions,
                seed=args.seed,
                on_round=lambda now, task=task: progress.update(task, completed=now),  # type: ignore[misc]
            )
            progress.update(task, completed=TRACES[name].seconds)
        if args.sweep is None:
            return runs, {}
        target = args.sweep or sweep.TABLES
        task = progress.add_task("sweep", total=sum(case.table in target for case in sweep.cases(policy)))
        return runs, sweep.run(policy, config, target, on_case=lambda: progress.advance(task))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.autoscaling_simulator",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    traces = "; ".join(f"{trace.name}: {trace.description}, {trace.hours:g} h" for trace in TRACES.values())
    parser.add_argument("--trace", action="append", choices=TRACES, help=f"may be repeated; default: all. {traces}")
    parser.add_argument(
        "--peak-sessions",
        type=at_least(1),
        default=100_000,
        metavar="N",
        help="average demand at the peak (default: %(default)s)",
    )
    parser.add_argument("--capacity", type=at_least(1), metavar="N", help="live sessions per GPU (default: see below)")
    parser.add_argument(
        "--decoder", choices=DECODERS, default=WAN, help="use its measured capacity (default: %(default)s)"
    )
    parser.add_argument(
        "--cold-start",
        type=float,
        nargs=3,
        default=[seconds / 60 for seconds in SimConfig().cold_start_s],
        metavar=("MIN", "MODE", "MAX"),
        help="minutes until a new pod is ready (default: 2 4 10)",
    )
    parser.add_argument(
        "--mtbf",
        type=float,
        default=SimConfig().mtbf_h,
        metavar="H",
        help="mean hours between failures of a pod (default: %(default)g)",
    )
    parser.add_argument("--fixed", type=at_least(1), metavar="PODS", help="a constant number of pods, no autoscaling")
    parser.add_argument("--policy", type=Path, default=DEFAULT_PATH, metavar="TOML", help="default: deploy/policy.toml")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    text = f"then vary the thresholds on small fleets (two minutes); only these tables of {', '.join(sweep.TABLES)}"
    parser.add_argument("--sweep", nargs="*", choices=sweep.TABLES, metavar="TABLE", help=text)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="plot sessions, pods and waiting viewers over time")
    args = parser.parse_args(argv)
    if args.mtbf <= 0:
        parser.error(f"--mtbf: got {args.mtbf:g}, expected more than 0")
    return args


if __name__ == "__main__":
    sys.exit(main())
