# SPDX-License-Identifier: Apache-2.0
"""The figures that the server tells the world: what each is called and what it counts.

Filled by the service's worker; `model.py` makes a metric of each.
"""

from __future__ import annotations

import dataclasses


def _described(description: str) -> int:
    field: int = dataclasses.field(default=0, metadata={"description": description})
    return field


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the service is doing; given to `on_statistics` by the worker whenever it changed."""

    live_sessions: int = _described("sessions that hold a slot")
    waiting_sessions: int = _described("sessions that wait for a slot")
    chunks: int = _described("chunks generated since the start")
    failed_sessions: int = _described("sessions that ended with an error since the start")
    refused_sessions: int = _described("sessions that found no slot since the start")
    resumed_sessions: int = _described("sessions that began with a snapshot since the start")
    deadline_misses: int = _described("chunks that came after their playback was due, since the start")
    capacity_sessions: int = _described("sessions at 16 frames per second that are admitted at once")

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Name -> what it counts."""
        return {field.name: field.metadata["description"] for field in dataclasses.fields(cls)}
