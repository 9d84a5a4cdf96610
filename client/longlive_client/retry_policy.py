# SPDX-License-Identifier: Apache-2.0
"""Whether, how and when a session tries for another connection. No I/O.

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
from longlive_serve.protocol.messages import Request

RESUMABLE = (
    ConnectionLostError,
    StallError,
    ServerShutdownError,
    ServerFailedError,
    SessionCancelledError,  # by the server, for not reading for long; or by `close` of a connection given up
    UnavailableError,
    UnknownSessionError,
)
MAX_ATTEMPTS = 16  # in a round, unless told otherwise; docs/capacity.md says why so many
BACK_OFF_S, LONGEST_BACK_OFF_S = 0.1, 5.0  # before the second round, and at most; doubled each time


class RetryPolicy:
    """The tries of one session to get a slot: a round of them when it begins, and whenever it breaks off."""

    def __init__(self, video: ResumeState, *, max_attempts: int, resume_for: float) -> None:
        self._video = video
        self._max_attempts, self._resume_for = max_attempts, resume_for
        self._asked = 0  # servers, in this round
        self._rounds = 0  # since the session broke off
        self._broke: float | None = None  # when that was; None while it goes on

    def next_start(self, session_id: str) -> Request:
        """The START of the next try. Only the last one of a round waits for a slot."""
        self._asked += 1
        return self._video.start(session_id, max_wait_s=0 if self._asked < self._max_attempts else None)

    def refused(self, error: VideoStreamError) -> bool:
        """Whether a server took no session, being full or about to go, and others are still to be asked."""
        goes = isinstance(error, ServerShutdownError) and not self._video.begun
        return (goes or isinstance(error, UnavailableError)) and self._asked < self._max_attempts

    def make_sense(self, error: VideoStreamError) -> bool:
        """Whether to try again after a connection has ended with `error`, which is taken note of."""
        refused = self.refused(error)
        if not refused and self._broke is None:
            self._broke, self._rounds = time.monotonic(), 0
        if self._broke is not None and time.monotonic() - self._broke >= self._resume_for:
            return False
        if refused:
            self._video.begun |= isinstance(error, UnavailableError)
            return True
        if not self._video.begun:  # what never gave an answer is no session yet: then it is the address or the request
            return False
        if isinstance(error, UnavailableError) and not self._video.next_frame:
            return False
        return self._video.owed > 0

    def next_round(self) -> float:
        """Begin a round. Returns the seconds to let pass before it; 0: the first since the session broke off."""
        pause = min(LONGEST_BACK_OFF_S, BACK_OFF_S * 2**self._rounds) * random.uniform(0.5, 1.0) if self._rounds else 0
        self._asked = 0
        self._rounds += 1
        return pause

    def went_on(self) -> bool:
        """Frames have come that are new. Returns whether the session had broken off."""
        broken, self._broke = self._broke is not None, None
        return broken
