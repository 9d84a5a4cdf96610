# SPDX-License-Identifier: Apache-2.0
"""Whether and when a session tries another connection. No I/O.

Used by `resume.py`, which makes the connections.
"""

from __future__ import annotations

import random
import time

from longlive_client.errors import (
    ConnectionLostError,
    ServerFailedError,
    ServerShutdownError,
    SessionCancelledError,
    StallError,
    UnavailableError,
    UnknownSessionError,
    VideoStreamError,
)
from longlive_client.resume_state import ResumeState

RESUMABLE = (
    ConnectionLostError,
    StallError,
    ServerShutdownError,
    ServerFailedError,
    SessionCancelledError,  # by the server, because the client did not read; or by `close` of a broken connection
    UnavailableError,
    UnknownSessionError,
)
MAX_ATTEMPTS = 16  # default per round; the reason is in docs/capacity.md
MIN_BACKOFF_S, MAX_BACKOFF_S = 0.1, 5.0  # before the second round, and at most; doubled each time


class RetryPolicy:
    """One round of attempts to get a slot at the start, and repeated rounds after an interruption."""

    def __init__(self, *, max_attempts: int, resume_for: float) -> None:
        self._max_attempts, self._resume_for = max_attempts, resume_for
        self._num_attempts = 0  # in this round
        self._num_rounds = 0  # since the session was interrupted

    def next_max_wait(self) -> float | None:
        """Begin an attempt. Returns `max_wait_s` of its START: only the last attempt of a round waits for a slot."""
        self._num_attempts += 1
        return 0 if self._num_attempts < self._max_attempts else None

    def is_refusal(self, error: VideoStreamError, state: ResumeState) -> bool:
        """Whether the server refused the session (full or shutting down) and this round has attempts left."""
        shutting_down = isinstance(error, ServerShutdownError) and not state.has_response
        return (shutting_down or isinstance(error, UnavailableError)) and self._num_attempts < self._max_attempts

    def should_retry(self, error: VideoStreamError, state: ResumeState) -> bool:
        """Whether to try again after a connection ended with `error`. Records the failure in `state`."""
        refused = self.is_refusal(error, state)
        now = time.monotonic()
        if not refused and state.failed_at is None:
            state.failed_at, self._num_rounds = now, 0
        if state.failed_at is not None and now - state.failed_at >= self._resume_for:
            return False
        if refused:
            state.has_response |= isinstance(error, UnavailableError)
            return True
        if not state.has_response:  # without any response there is no session yet: the address or the request is wrong
            return False
        if isinstance(error, UnavailableError) and not state.next_frame:
            return False
        return state.remaining > 0

    def next_delay(self) -> float:
        """Begin a round. Returns the seconds to wait before it: 0 for the first after an interruption."""
        backoff = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2**self._num_rounds) if self._num_rounds else 0
        self._num_attempts = 0
        self._num_rounds += 1
        return backoff * random.uniform(0.5, 1.0)
