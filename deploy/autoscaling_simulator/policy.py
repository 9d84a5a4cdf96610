# SPDX-License-Identifier: Apache-2.0
"""The autoscaling policy of deploy/policy.toml. Read by the simulator.

Manifests and pages copy its numbers; `tests.deploy.test_copied_numbers` compares them.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from longlive_serve.config.toml_files import read_toml

DEFAULT_PATH = Path(__file__).parents[1] / "policy.toml"
PERCENT, PODS = "Percent", "Pods"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rate:
    """A limit on the change of the fleet's size per period."""

    type: str
    value: int
    """Percent of the size at the start of the period, or pods."""
    period_s: float

    def __post_init__(self) -> None:
        if self.type not in (PERCENT, PODS):
            raise ValueError(f"type: got {self.type!r}, expected {PERCENT} or {PODS}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """Limits on scaling up, or on scaling down."""

    stabilization_s: float
    policies: tuple[Rate, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drain:
    grace_period_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """Settings of servers and clients that the simulator needs."""

    max_chunks_ahead: int
    max_wait_s: float
    max_waiting: int
    max_attempts: int
    """A client setting; the others are in every pod's serve.toml."""

    def __post_init__(self) -> None:
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: got {self.max_attempts}, expected 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """All keys are required; the file explains them."""

    target_busy_share: float
    target_late_share: float
    spare_pods: int
    refused_window_s: float
    min_replicas: int
    max_replicas: int
    tolerance: float
    sync_period_s: float
    scale_up: Direction
    scale_down: Direction
    drain: Drain
    service: Service

    def __post_init__(self) -> None:
        for key in ("target_busy_share", "target_late_share"):
            if not 0 < getattr(self, key) <= 1:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected more than 0 and at most 1")
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ValueError(f"got replicas {self.min_replicas} to {self.max_replicas}, expected 1 or more, in order")
        if self.sync_period_s <= 0:
            raise ValueError(f"sync_period_s: got {self.sync_period_s}, expected more than 0")

    @classmethod
    def from_toml(cls, path: Path = DEFAULT_PATH) -> Policy:
        """Read a policy file. Raises ValueError with the file and the key."""
        values = read_toml(path)
        try:
            parts = {key: values.pop(key, {}) for key in ("scale_up", "scale_down", "drain", "service")}
            return cls(
                **values,
                scale_up=_direction(parts["scale_up"]),
                scale_down=_direction(parts["scale_down"]),
                drain=Drain(**parts["drain"]),
                service=Service(**parts["service"]),
            )
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None

    def fixed(self, pods: int) -> Policy:
        """The same policy with a constant number of pods."""
        return dataclasses.replace(self, min_replicas=pods, max_replicas=pods)


def _direction(values: dict[str, Any]) -> Direction:
    return Direction(**values | {"policies": tuple(Rate(**rate) for rate in values.get("policies", ()))})
