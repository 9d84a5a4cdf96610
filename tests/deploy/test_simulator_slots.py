# SPDX-License-Identifier: Apache-2.0
"""Who gets a slot in a simulated fleet: by formula where queueing theory has one, else small cases by hand."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("simpy", reason="needs the extra `deploy`")

from deploy.autoscaling_simulator.arrivals import TRACES, Arrivals, Trace
from deploy.autoscaling_simulator.fleet import Fleet
from deploy.autoscaling_simulator.pod import Pod
from deploy.autoscaling_simulator.policy import Policy
from deploy.autoscaling_simulator.report.session_stats import FAILURE, SCALE_DOWN
from deploy.autoscaling_simulator.report.simulate import simulate
from deploy.autoscaling_simulator.sim_config import SimConfig

DEFAULT_POLICY = Policy.from_toml()
IMMORTAL = SimConfig(mtbf_h=1e15)
SINGLE = dataclasses.replace(IMMORTAL, capacity=1)


class Script(Arrivals):
    """Viewers who come as a test has it: when, and for how long."""

    def __init__(self, viewers: Sequence[tuple[float, float]]) -> None:
        self._viewers = list(viewers)

    def until(self, end: float) -> tuple[list[float], list[float]]:
        arrival_time = [viewer for viewer in self._viewers if viewer[0] <= end]
        self._viewers = self._viewers[len(arrival_time) :]
        return [time for time, _ in arrival_time], [length for _, length in arrival_time]


def fleet_of(
    pods: int, *viewers: tuple[float, float], config: SimConfig = SINGLE, **settings: Any
) -> tuple[Fleet, list[Pod]]:
    """So many pods that are ready. `settings`: of the service."""
    service = dataclasses.replace(DEFAULT_POLICY.service, **settings)
    fleet = Fleet(config, service, Script(viewers), seed=0)
    ready = [fleet.create_pod(0.0) for _ in range(pods)]
    for pod in ready:
        fleet.add(pod)
    return fleet, ready


def erlang_b(slots: int, offered: float) -> float:
    """Share of who come that find all slots taken, with nobody waiting."""
    blocked = 1.0
    for slot in range(1, slots + 1):
        blocked = offered * blocked / (slot + offered * blocked)
    return blocked


def steady(
    monkeypatch: pytest.MonkeyPatch, peak: float, pods: int, hours: float = 40, **settings: Any
) -> dict[str, Any]:
    """Figures of a fleet with as many arrivals at all times. `settings`: of the service."""
    trace = Trace(name="steady", hours=hours, description="", shape=lambda times, random: 0 * times + 1)
    monkeypatch.setitem(TRACES, "steady", trace)
    service = dataclasses.replace(DEFAULT_POLICY.service, **settings)
    policy = dataclasses.replace(DEFAULT_POLICY, service=service).fixed(pods)
    return simulate("steady", config=IMMORTAL, policy=policy, peak=peak, seed=0).metrics


# Formulas


def test_with_many_tries_and_no_queue_a_fleet_refuses_as_one_big_server(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = steady(monkeypatch, 100, 30, max_attempts=300, max_waiting=0)
    assert metrics["refused_share"] == pytest.approx(erlang_b(90, 100), abs=0.01)
    assert metrics["arrived"] == pytest.approx(100 / SimConfig().mean_session_s * 40 * 3600, rel=0.02)
    assert metrics["perfect_gpu_hours"] == pytest.approx(100 / 3 * 40, rel=0.02)


def test_with_one_try_and_no_queue_every_pod_refuses_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = steady(monkeypatch, 100, 30, max_attempts=1, max_waiting=0)
    assert metrics["refused_share"] == pytest.approx(erlang_b(3, 100 / 30), abs=0.01)


def test_with_some_tries_those_are_refused_who_draw_nothing_but_full_pods(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a large fleet pods are independent: each gets what the tries at full ones leave over."""
    metrics = steady(monkeypatch, 840, 400, hours=10, max_attempts=4, max_waiting=0)
    offered = low = 2.1
    high = 10.0
    while high - low > 1e-6:  # what a pod with a free slot is offered: 2.1 / (1 - share of full ones) at most
        offered = (low + high) / 2
        full = erlang_b(3, offered)
        low, high = (offered, high) if offered * (1 - full) < 2.1 * (1 - full**4) else (low, offered)
    assert full == pytest.approx(0.4, abs=0.02)
    assert metrics["refused_share"] == pytest.approx(full**4, rel=0.1)
    assert metrics["at_once_share"] == pytest.approx(1 - full**4, abs=0.005)


# Cases by hand


def test_a_viewer_waits_for_one_pod_and_not_for_the_others() -> None:
    fleet, (pod, other) = fleet_of(2, (0, 100), (0, 100), (1, 10))
    fleet.advance(1)
    waits_at, free = (pod, other) if pod.queue else (other, pod)
    assert (fleet.live, fleet.queued, fleet.full) == (2, 1, 2)
    assert not free.queue
    fleet.add(fleet.create_pod(2.0))
    fleet.advance(30)
    assert (fleet.live, fleet.queued) == (2, 1), "the new pod is not for those who wait"
    fleet.advance(31.5)
    assert (fleet.queued, fleet.stats.refused, len(waits_at.queue)) == (0, 1, 0)


def test_a_pod_serves_its_queue_in_the_order_of_arrival() -> None:
    fleet, (pod,) = fleet_of(1, (0, 10), (1, 10), (2, 10), (3, 10), max_waiting=2, max_wait_s=15)
    fleet.advance(5)
    assert (fleet.queued, fleet.stats.refused) == (2, 1), "the queue has two places"
    fleet.advance(16.5)
    assert (fleet.queued, fleet.stats.waits) == (1, [9.0])
    fleet.advance(18)
    assert (fleet.queued, fleet.stats.refused) == (0, 2), "the last one's 15 s are over"
    fleet.advance(30)
    assert (fleet.live, fleet.stats.completed, pod.sessions) == (0, 2, {})


def test_whoever_was_watching_goes_before_new_viewers_and_takes_the_last_place() -> None:
    fleet, (gone, pod) = fleet_of(2, (0, 100), (0, 10), (1, 50), (2, 50), max_waiting=2)
    fleet.advance(0.5)
    if gone.sessions[min(gone.sessions)] == 10:
        gone, pod = pod, gone
    fleet.start_draining(gone)
    fleet.advance(3)
    assert [queued.since for queued in pod.queue] == [1, 2]
    fleet.resume(fleet.terminate(gone, 3.0, SCALE_DOWN), 3.0)
    assert [queued.disconnected is not None for queued in pod.queue] == [True, False]
    assert fleet.stats.refused == 1
    fleet.advance(10)
    assert (fleet.stats.moved[SCALE_DOWN], fleet.stats.stalls[SCALE_DOWN]) == (1, 1)
    assert fleet.stats.longest_gap_s > 7, "it has waited since 3 s"
    assert fleet.queued == 1


def test_a_session_that_broke_off_looks_for_a_slot_again_and_again_until_it_is_too_late() -> None:
    fleet, (gone, pod) = fleet_of(2, (0, 500), (0, 500))
    fleet.advance(1)
    fleet.start_draining(gone)
    disconnected = fleet.terminate(gone, 1.0, FAILURE)
    fleet.resume(disconnected, 1.0)
    assert (fleet.num_disconnected, fleet.queued) == (0, 1)
    fleet.advance(31.05)
    assert (fleet.num_disconnected, fleet.queued) == (1, 0), "the queue has refused it; it backs off"
    fleet.advance(31.3)
    assert (fleet.num_disconnected, fleet.queued, disconnected[0].rounds) == (0, 1, 2)
    fleet.advance(63)
    assert (fleet.num_disconnected, fleet.queued, fleet.stats.lost, len(pod.queue)) == (0, 0, 1, 0)


def test_a_session_that_broke_off_finds_a_pod_that_has_come_in_between() -> None:
    fleet, (gone, _) = fleet_of(2, (0, 500), (0, 500))
    fleet.advance(1)
    fleet.start_draining(gone)
    disconnected = fleet.terminate(gone, 1.0, FAILURE)
    fleet.resume(disconnected, 1.0)
    fleet.add(fleet.create_pod(5.0))
    fleet.advance(40)
    assert (fleet.live, fleet.queued, fleet.stats.moved[FAILURE]) == (2, 0, 1)
    assert 30 < fleet.stats.longest_gap_s < 40, "it has waited in the queue of the other one"


def test_every_try_takes_time_to_connect() -> None:
    fleet, pods = fleet_of(20, *[(0, 500)] * 19, max_attempts=300)
    fleet.advance(1)
    gone = next(pod for pod in pods if pod.sessions)
    fleet.start_draining(gone)
    (disconnected,) = fleet.terminate(gone, 1.0, SCALE_DOWN)
    fleet.resume([disconnected], 1.0)
    assert fleet.stats.moved[SCALE_DOWN] == 1
    assert disconnected.connect_s > SimConfig().reconnect_s[1], "18 of 19 pods are full"
    assert fleet.stats.longest_gap_s > disconnected.connect_s


def test_a_pod_that_drains_still_serves_its_queue() -> None:
    fleet, (pod,) = fleet_of(1, (0, 10), (1, 10), (2, 10))
    fleet.advance(3)
    fleet.start_draining(pod)
    fleet.advance(15)
    assert fleet.stats.waits == [9.0]
    assert fleet.queued == 1
    fleet.resume(fleet.terminate(pod, 15.0, SCALE_DOWN), 15.0)
    assert (fleet.queued, fleet.live, fleet.pods, fleet.stats.refused) == (0, 0, 0, 1), (
        "who has seen nothing is refused"
    )
    fleet.advance(80)
    assert fleet.stats.lost == 1


def test_without_a_pod_whoever_comes_is_refused() -> None:
    fleet, _ = fleet_of(0, (0, 10))
    fleet.advance(1)
    assert (fleet.stats.arrived, fleet.stats.refused) == (1, 1)


# The client


def test_simulated_clients_behave_as_the_client_does() -> None:
    resumable = pytest.importorskip("longlive_client.resume", reason="needs the extra `client`", exc_type=ImportError)
    from longlive_client import retry_policy

    defaults = inspect.signature(resumable.ResumableStream.__init__).parameters
    config = SimConfig()
    assert config.back_off_s == (retry_policy.MIN_BACKOFF_S, retry_policy.MAX_BACKOFF_S)
    assert config.resume_for_s == defaults["resume_for"].default
    assert config.stall_timeout_s == defaults["stall_timeout"].default


def test_the_policy_tries_as_often_as_the_client() -> None:
    resumable = pytest.importorskip("longlive_client.resume", reason="needs the extra `client`", exc_type=ImportError)
    defaults = inspect.signature(resumable.ResumableStream.__init__).parameters
    assert defaults["max_attempts"].default == DEFAULT_POLICY.service.max_attempts


def test_the_world_says_goodbye_as_servers_do() -> None:
    sessions = pytest.importorskip(
        "longlive_serve.engine.session_manager", reason="needs the extra `torch`", exc_type=ImportError
    )
    assert SimConfig().goodbye_chunks == sessions.DRAIN_CHUNKS
