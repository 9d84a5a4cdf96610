# SPDX-License-Identifier: Apache-2.0
"""The autoscaling policy: the autoscaler's arithmetic, fleets in small, and the committed figures of the large ones."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("simpy", reason="needs the extra `deploy`")

from deploy.autoscaling_simulator import __main__ as command
from deploy.autoscaling_simulator.arrivals import TRACES, Arrivals
from deploy.autoscaling_simulator.cluster import Cluster
from deploy.autoscaling_simulator.fleet import Fleet
from deploy.autoscaling_simulator.hpa import Autoscaler, desired_by_metric
from deploy.autoscaling_simulator.pod import DRAINING
from deploy.autoscaling_simulator.policy import DEFAULT_PATH, Direction, Policy, Rate
from deploy.autoscaling_simulator.report.session_stats import SessionStats
from deploy.autoscaling_simulator.report.simulate import SimulationResult, simulate, with_enough_replicas
from deploy.autoscaling_simulator.report.tables import SECTION
from deploy.autoscaling_simulator.sim_config import SimConfig, capacity
from deploy.capacity.__main__ import RESULTS

DEFAULT_POLICY = Policy.from_toml()
IMMORTAL = SimConfig(mtbf_h=1e15)
AT_ONCE = Direction(stabilization_s=0, policies=())
FREE = dataclasses.replace(DEFAULT_POLICY, min_replicas=1, max_replicas=10_000, scale_up=AT_ONCE, scale_down=AT_ONCE)


def run(
    trace: str, peak: float, policy: Policy = DEFAULT_POLICY, config: SimConfig | None = None, seed: int = 0
) -> SimulationResult:
    return simulate(trace, config=config or SimConfig(), policy=policy, peak=peak, seed=seed)


def good_enough(diurnal: dict[str, Any]) -> None:
    """What the shipped thresholds promise of a day."""
    assert diurnal["wait_p95_s"] < 10
    assert diurnal["refused"] <= 0.001 * diurnal["arrived"]
    assert diurnal["stalls_by_cause"]["scale_down"] == 0
    assert diurnal["lost"] == 0


def has_no_leak(metrics: dict[str, Any]) -> None:
    """Every session was served, was refused, got lost or is still there."""
    arrival_time = metrics["live_at_the_beginning"] + metrics["arrived"]
    gone = metrics["completed"] + metrics["refused"] + metrics["lost"]
    assert arrival_time == gone + metrics["live_at_the_end"] + metrics["waiting_at_the_end"]


# The autoscaler


@pytest.mark.parametrize(
    ("current", "metric", "target"),
    [
        (10, 0.70, 10),
        (10, 0.76, 10),  # within 10 %
        (10, 0.64, 10),
        (10, 0.78, 12),  # 11.14
        (10, 0.62, 9),  # 8.86
        (10, 1.40, 20),
        (7, 2.1, 21),
        (10, 0.0, 0),
    ],
)
def test_a_metric_asks_for_pods_as_kubernetes_computes_it(current: int, metric: float, target: int) -> None:
    assert desired_by_metric(current, metric, 0.7, 0.1) == target


def test_the_metric_that_asks_for_more_wins() -> None:
    assert Autoscaler(FREE).desired(0, 10, busy_share=0.35, late_share=0.0) == 5
    assert Autoscaler(FREE).desired(0, 10, busy_share=0.35, late_share=0.02) == 20
    assert Autoscaler(FREE).desired(0, 10, busy_share=1.4, late_share=0.005) == 20


def test_a_fleet_shrinks_to_the_most_that_was_wanted_within_the_window() -> None:
    policy = dataclasses.replace(FREE, scale_down=Direction(stabilization_s=60, policies=()))
    autoscaler, replicas = Autoscaler(policy), [10]
    for time, target in ((0, 4), (15, 8), (30, 4), (45, 4), (60, 4), (75, 4), (90, 4)):
        replicas.append(autoscaler.desired(time, replicas[-1], 0.7 * target / replicas[-1], 0.0))
    # What there was at the beginning counts for 60 s, then what was wanted at 15 s until 75 s.
    assert replicas[1:] == [10, 10, 10, 10, 8, 4, 4]


def test_a_fleet_grows_to_the_least_that_was_wanted_within_the_window() -> None:
    autoscaler = Autoscaler(dataclasses.replace(FREE, scale_up=Direction(stabilization_s=30, policies=())))
    assert [autoscaler.desired(time, 10, 1.4, 0.0) for time in (0, 15, 30, 45)] == [10, 10, 20, 20]


def test_rates_limit_what_changes_within_their_period() -> None:
    rates = (Rate(type="Percent", value=50, period_s=60), Rate(type="Pods", value=4, period_s=60))
    direction = Direction(stabilization_s=0, policies=rates)
    policy = dataclasses.replace(FREE, scale_up=direction, scale_down=direction)
    up, grown = Autoscaler(policy), [4]
    for time in (0, 15, 60, 75, 120):
        grown.append(up.desired(time, grown[-1], 7.0, 0.0))
    assert grown[1:] == [8, 8, 12, 12, 18]  # + 4 pods, which is more than 50 %; nothing within the minute; ...; + 50 %
    down, shrunk = Autoscaler(policy), [21]
    for time in (0, 15, 60, 120):
        shrunk.append(down.desired(time, shrunk[-1], 0.01, 0.0))
    assert shrunk[1:] == [10, 10, 5, 1]  # half of 21, rounded down; half of 10; four less than 5


def test_there_are_never_more_or_fewer_pods_than_allowed() -> None:
    policy = dataclasses.replace(FREE, min_replicas=3, max_replicas=12)
    assert Autoscaler(policy).desired(0, 10, 7.0, 0.0) == 12
    assert Autoscaler(policy).desired(0, 10, 0.0, 0.0) == 3


# Fleets in small


def test_shipped_thresholds_hold_through_a_day() -> None:
    metrics = run("diurnal", 1000).metrics
    good_enough(metrics)
    has_no_leak(metrics)
    assert metrics["moved_by_cause"]["scale_down"] > 0  # and hardly anybody noticed
    assert metrics["gpu_hours_by_perfect"] < 1.7


@pytest.mark.parametrize("trace", ["burst", "flash_crowd"])
def test_no_session_gets_lost_in_the_books(trace: str) -> None:
    frail = SimConfig(mtbf_h=2, silent_failures=0.5)
    metrics = run(trace, 100, config=frail).metrics
    has_no_leak(metrics)
    assert metrics["pods_failed"] > 10
    assert metrics["stalls_by_cause"]["pod_failure"] > 0
    tight = run(trace, 100, DEFAULT_POLICY.fixed(12), config=frail).metrics
    has_no_leak(tight)
    assert tight["refused"] > 0
    assert tight["lost"] > 0


def test_a_fleet_that_is_too_small_and_never_grows_refuses() -> None:
    fixed = run("burst", 100, DEFAULT_POLICY.fixed(20), IMMORTAL).metrics
    assert fixed["refused_share"] > 0.1
    assert fixed["gpu_hours"] == pytest.approx(20 * 6)
    assert fixed["peak_live"] == 60
    assert run("burst", 100, config=IMMORTAL).metrics["refused_share"] < 0.001


def test_a_seed_decides_everything() -> None:
    first, again, other = (run("burst", 100, seed=seed) for seed in (3, 3, 4))
    assert first.metrics == again.metrics
    assert first.samples == again.samples
    assert first.metrics != other.metrics


@pytest.mark.parametrize("trace", ["burst", "flash_crowd"])
def test_a_trace_reaches_the_peak_that_was_asked_for(trace: str) -> None:
    enough = run(trace, 2000, DEFAULT_POLICY.fixed(1500), IMMORTAL)
    assert enough.metrics["refused"] == 0
    assert enough.metrics["peak_live"] == pytest.approx(2000, rel=0.08)
    settled = [sample.live for sample in enough.samples if sample.time < 300]  # nobody has to come first
    assert max(settled) < 1.3 * min(settled)


def test_viewers_notice_a_move_where_little_is_sent_ahead() -> None:
    shares = []
    for max_chunks_ahead, goodbye in ((1, 0), (2, 0), (2, 2)):
        policy = dataclasses.replace(
            DEFAULT_POLICY, service=dataclasses.replace(DEFAULT_POLICY.service, max_chunks_ahead=max_chunks_ahead)
        )
        metrics = run("burst", 1000, policy, dataclasses.replace(IMMORTAL, goodbye_chunks=goodbye)).metrics
        moved = metrics["moved_by_cause"]["scale_down"]
        assert moved > 50
        shares.append(metrics["stalls_by_cause"]["scale_down"] / moved)
    assert shares[0] > 0.1
    assert shares[1] < 0.02
    assert shares[2] == 0


def test_late_chunks_let_a_fleet_grow() -> None:
    calm, late = (run("burst", 100, config=SimConfig(late_share=share)).metrics["peak_pods"] for share in (0.0, 0.2))
    assert late > calm


def test_refused_viewers_let_a_fleet_grow_faster() -> None:
    shares = []
    for window in (0, DEFAULT_POLICY.refused_window_s):
        policy = dataclasses.replace(DEFAULT_POLICY, refused_window_s=window)
        shares.append(run("flash_crowd", 500, policy).metrics["refused_share"])
    assert shares[1] < 0.7 * shares[0]


def test_a_pod_that_drains_keeps_its_number() -> None:
    config, policy = IMMORTAL, DEFAULT_POLICY.fixed(4)
    arrivals = Arrivals(TRACES["diurnal"], config, 60, 0)
    fleet = Fleet(config, policy.service, arrivals, 0)
    cluster = Cluster(config, policy, fleet, 0)
    cluster.run(60, 12)
    cluster._scale(2)
    assert [pod.state for pod in cluster._pods[2:]] == [DRAINING] * 2
    cluster._scale(5)
    assert fleet.pods == 5  # the fifth starts; the numbers of the third and the fourth are not free yet
    for number in (2, 3):
        fleet.terminate(cluster._pods[number], 60, "scale_down")
    cluster._scale(5)
    assert fleet.pods == 5
    assert all(pod.state != DRAINING for pod in cluster._pods)


def test_percentiles_count_those_who_did_not_wait() -> None:
    stats = SessionStats(at_once=90, waits=[3.0, 1.0, 2.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    assert [stats.wait(percent) for percent in (50, 90, 91, 95, 100)] == [0, 0, 1, 5, 10]
    assert SessionStats().wait(95) == 0


# Settings, command, committed figures


def test_a_wrong_policy_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for old, new, complaint in (
        ("spare_pods", "spare_parts", "spare_parts"),
        ("target_busy_share = 0.7", "target_busy_share = 7", "target_busy_share: got 7"),
        ('"Pods"', '"Pots"', "got 'Pots'"),
        ("grace_period_s", "grace", "grace"),
        ("max_attempts = ", "max_attempts = -", "max_attempts: got -"),
    ):
        path = tmp_path / "policy.toml"
        path.write_text(DEFAULT_PATH.read_text(encoding="utf-8").replace(old, new))
        with pytest.raises(ValueError, match=complaint):
            Policy.from_toml(path)
        assert command.main(["--policy", str(path)]) == 1
        assert complaint in capsys.readouterr().err


def test_a_policy_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(DEFAULT_PATH.read_text(encoding="utf-8").encode("utf-8-sig"))
    assert Policy.from_toml(path) == DEFAULT_POLICY


def test_the_capacity_is_the_measured_one_if_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    assert capacity("wan", path) == (3, "projected, not measured")
    section = {"hardware": "H200", "figures_of": {"full_vae": "fused", "tiny_vae": "fused tiny"}}
    metrics = {"live_sessions_full_vae": 4, "live_sessions_tiny_vae": None, "benchmarks.engines": section}
    path.write_text(json.dumps(metrics))
    assert capacity("wan", path) == (4, "measured on H200 with fused")
    assert capacity("tiny", path) == (3, "projected, not measured")


def test_the_command_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "new/autoscaling.json", tmp_path / "new/autoscaling.png"
    options = ["--trace", "flash_crowd", "--peak-sessions", "60", "--capacity", "2", "--cold-start", "1", "2", "3"]
    assert command.main([*options, "--json", str(record), "--plot", str(picture)]) == 0
    assert "flash_crowd" in capsys.readouterr().out
    written = json.loads(record.read_text(encoding="utf-8"))
    assert {"wait_p95_s", "refused", "stalls", "gpu_hours"} <= written["flash_crowd"].keys()
    assert written[SECTION]["world"]["capacity"] == 2
    assert written[SECTION]["command"].startswith("python -m deploy.autoscaling_simulator --trace flash_crowd")
    assert picture.stat().st_size > 1000


def test_the_committed_figures_keep_what_the_thresholds_promise() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    good_enough(record["diurnal"])
    assert record["burst"]["wait_p95_s"] < 10
    for trace in TRACES:
        has_no_leak(record[trace])
        assert record[trace]["gpu_hours"] > record[trace]["perfect_gpu_hours"] * 0.9


def test_the_committed_figures_are_those_of_the_shipped_policy() -> None:
    run_config = json.loads(RESULTS.read_text(encoding="utf-8"))[SECTION]
    enough = with_enough_replicas(DEFAULT_POLICY, run_config["peak_sessions"], run_config["world"]["capacity"])
    assert run_config["policy"] == json.loads(json.dumps(dataclasses.asdict(enough)))
    assert run_config["peak_sessions"] == 100_000
    assert math.isfinite(run_config["world"]["mtbf_h"])
