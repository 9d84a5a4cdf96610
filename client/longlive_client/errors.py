# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with a video stream: one class for each kind of RequestError, and two that only a client sees."""

from __future__ import annotations

from longlive_serve.protocol.errors import RequestError


class VideoStreamError(RequestError):
    """Any failure of a video stream. `kind` and `message` are those of the RequestError that the server sent."""

    @classmethod
    def of(cls, error: RequestError) -> VideoStreamError:
        """`error` as the class that belongs to its kind."""
        return _CLASSES.get(error.kind, ServerFailedError)(error.kind, error.message)


class InvalidRequestError(VideoStreamError):
    """The request is wrong (an empty prompt, for example). The session goes on as if it had not been sent."""


class ForbiddenError(VideoStreamError):
    """The session belongs to somebody else: the token is not the one that it began with. Or a proxy lets nobody in who
    shows no access token that it knows."""


class RateLimitedError(VideoStreamError):
    """More requests in a second than the server takes from one session. The session goes on as if not sent."""


class UnknownSessionError(VideoStreamError):
    """The server knows no such session: it has ended, or it asked for nothing for too long and lost its slot."""


class SessionExistsError(VideoStreamError):
    """A session of this id is already running."""


class FrameLimitError(VideoStreamError):
    """The video has reached the length at which the `base` variant ends."""


class SessionCancelledError(VideoStreamError):
    """The session was cancelled, by `cancel()` or by the server."""


class ServerShutdownError(VideoStreamError):
    """The server is shutting down."""


class UnavailableError(VideoStreamError):
    """The server is full: try again after the time that the message names."""


class ServerFailedError(VideoStreamError):
    """The server, or Triton itself, failed."""


class StallError(VideoStreamError):
    """The server owes an answer and has said nothing for `stall_timeout` seconds."""

    def __init__(self, message: str) -> None:
        super().__init__("stalled", message)


class ConnectionLostError(VideoStreamError):
    """The server cannot be reached, or the stream broke."""

    def __init__(self, message: str) -> None:
        super().__init__("connection_lost", message)


_CLASSES: dict[str, type[VideoStreamError]] = {
    RequestError.INVALID_REQUEST: InvalidRequestError,
    RequestError.FORBIDDEN: ForbiddenError,
    RequestError.RATE_LIMITED: RateLimitedError,
    RequestError.UNKNOWN_SESSION: UnknownSessionError,
    RequestError.SESSION_EXISTS: SessionExistsError,
    RequestError.FRAME_LIMIT: FrameLimitError,
    RequestError.CANCELLED: SessionCancelledError,
    RequestError.SHUTTING_DOWN: ServerShutdownError,
    RequestError.UNAVAILABLE: UnavailableError,
    RequestError.INTERNAL: ServerFailedError,
}
