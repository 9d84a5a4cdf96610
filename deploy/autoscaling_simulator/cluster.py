# SPDX-License-Identifier: Apache-2.0
"""Simulates Kubernetes around the fleet with simpy: sync periods of the autoscaler; pods that start, drain and fail.

Between two simpy events the fleet advances on its own, so all times are exact, except that the failure rate is constant
within a sync period.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections import deque
from collections.abc import Callable, Generator

import numpy as np
import simpy

from deploy.autoscaling_simulator.fleet import Fleet
from deploy.autoscaling_simulator.hpa import Autoscaler
from deploy.autoscaling_simulator.pod import DRAINING, GONE, READY, STARTING, DisconnectedSession, Pod
from deploy.autoscaling_simulator.policy import Policy
from deploy.autoscaling_simulator.report.session_stats import FAILURE, SCALE_DOWN
from deploy.autoscaling_simulator.sim_config import CHUNK_PLAYS_S, SimConfig

Process = Generator[simpy.Event, None, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The fleet's state in one sync period."""

    time: float
    arrived: int
    refused: int
    live: int
    queued: int
    ready: int
    pods: int
    replicas: int


class Cluster:
    """Runs a fleet with an autoscaling policy."""

    def __init__(self, config: SimConfig, policy: Policy, fleet: Fleet, seed: int) -> None:
        self.samples: list[Sample] = []
        self.failures = 0
        self.drained = 0
        """Pods that were scaled down while they accepted sessions."""
        self._config, self._policy, self._fleet = config, policy, fleet
        self._env = simpy.Environment()
        self._autoscaler = Autoscaler(policy)
        self._random, self._generator = random.Random(seed), np.random.default_rng(seed)
        self._replicas = 0
        self._pods: list[Pod] = []  # by number
        self._reused: set[int] = set()  # numbers that get a new pod when their draining one is gone
        window, delay = (round(s / policy.sync_period_s) for s in (policy.refused_window_s, config.metric_delay_s))
        self._demands: deque[float] = deque(maxlen=delay + 1)  # of the last sync periods, the newest last
        self._refused: deque[int] = deque([0], maxlen=window + 1)  # cumulative, of the last sync periods

    def run(self, seconds: float, live: float, on_round: Callable[[float], None] = lambda now: None) -> None:
        """`live`: expected sessions at the start; enough pods for them are ready. `on_round`: called with the time."""
        policy, room = self._policy, self._config.capacity * self._policy.target_busy_share
        target = math.ceil(live / room) + policy.spare_pods
        self._replicas = min(max(target, policy.min_replicas), policy.max_replicas)
        for _ in range(self._replicas):
            pod = self._fleet.create_pod(0.0)
            self._pods.append(pod)
            self._fleet.add(pod)
        self._fleet.start()
        self._env.process(self._control(on_round))
        self._env.run(until=seconds)
        self._fleet.advance(seconds)

    def _control(self, on_round: Callable[[float], None]) -> Process:
        while True:
            now, fleet = self._env.now, self._fleet
            fleet.advance(now)
            self._sample(now)
            self._scale(self._autoscaler.desired(now, self._replicas, self._busy_share(), self._late_share()))
            self._schedule_failures()
            on_round(now)
            yield self._env.timeout(self._policy.sync_period_s)

    def _sample(self, now: float) -> None:
        fleet = self._fleet
        sample = Sample(
            time=now,
            arrived=fleet.stats.arrived,
            refused=fleet.stats.refused,
            live=fleet.live,
            queued=fleet.queued,
            ready=fleet.ready,
            pods=fleet.pods,
            replicas=self._replicas,
        )
        self.samples.append(sample)

    def _busy_share(self) -> float:
        """Demand per slot: live, waiting and recently refused sessions, and the spare pods."""
        config, policy, last = self._config, self._policy, self.samples[-1]
        self._refused.append(last.refused)
        self._demands.append(last.live + last.queued + last.refused - self._refused[0])
        spare = policy.spare_pods * policy.target_busy_share * config.capacity
        return (self._demands[0] + spare) / (config.capacity * self._replicas)

    def _late_share(self) -> float:
        """Only pods without a free slot have late chunks."""
        config, fleet = self._config, self._fleet
        chunks = self._policy.sync_period_s / CHUNK_PLAYS_S
        late = self._generator.binomial(round(fleet.full * config.capacity * chunks), config.late_share)
        return float(late) / (fleet.live * chunks) if fleet.live else 0.0

    def _scale(self, replicas: int) -> None:
        """Like a StatefulSet: the highest number goes first, and a number is reusable once its pod is gone."""
        for number in range(replicas, self._replicas):
            self._reused.discard(number)
            self._remove(self._pods[number])
        for number in range(self._replicas, replicas):
            if number == len(self._pods):
                self._pods.append(self._create_pod())
            else:
                self._reused.add(number)
        for number in [number for number in self._reused if self._pods[number].state == GONE]:
            self._reused.discard(number)
            self._pods[number] = self._create_pod()
        self._replicas = replicas

    def _create_pod(self) -> Pod:
        pod = self._fleet.create_pod(self._env.now)
        self._env.process(self._start(pod))
        return pod

    def _start(self, pod: Pod) -> Process:
        low, mode, high = self._config.cold_start_s
        yield self._env.timeout(self._random.triangular(low, high, mode))
        if pod.state == STARTING:
            self._fleet.advance(self._env.now)
            self._fleet.add(pod)

    def _remove(self, pod: Pod) -> None:
        if pod.state == STARTING:
            self._fleet.release_pod(pod, self._env.now)
        elif pod.state == READY:
            self.drained += 1
            self._fleet.start_draining(pod)
            self._env.process(self._drain(pod))

    def _drain(self, pod: Pod) -> Process:
        if not pod.sessions:
            self._fleet.release_pod(pod, self._env.now)
            return
        yield self._env.timeout(self._policy.drain.grace_period_s)
        now = self._env.now
        self._fleet.advance(now)
        if pod.state == DRAINING:
            self._fleet.resume(self._fleet.terminate(pod, now, SCALE_DOWN), now)

    def _schedule_failures(self) -> None:
        period = self._policy.sync_period_s
        for _ in range(self._generator.poisson(self._fleet.ready * period / (3600 * self._config.mtbf_h))):
            self._env.process(self._fail(self._random.uniform(0, period)))

    def _fail(self, after: float) -> Process:
        yield self._env.timeout(after)
        config, fleet, now = self._config, self._fleet, self._env.now
        fleet.advance(now)
        if not fleet.ready:
            return
        number = self._random.randrange(self._replicas)
        while self._pods[number].state != READY:
            number = self._random.randrange(self._replicas)
        pod = self._pods[number]
        self.failures += 1
        fleet.start_draining(pod)
        delay = config.stall_timeout_s if self._random.random() < config.silent_failures else 0.0
        disconnected = fleet.terminate(pod, now, FAILURE, delay)
        self._pods[number] = self._create_pod()  # Kubernetes replaces it without the autoscaler
        if delay:
            self._env.process(self._detect(disconnected, delay))
        else:
            fleet.resume(disconnected, now)

    def _detect(self, disconnected: list[DisconnectedSession], after: float) -> Process:
        yield self._env.timeout(after)
        self._fleet.advance(self._env.now)
        self._fleet.resume(disconnected, self._env.now)
