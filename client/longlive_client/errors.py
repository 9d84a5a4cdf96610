# SPDX-License-Identifier: Apache-2.0
"""Errors of a video stream: one class for each kind of RequestError, and two that the client itself raises."""

from __future__ import annotations

from longlive_serve.protocol.errors import RequestError


class VideoStreamError(RequestError):
    """Any failure of a video stream. `kind` and `message` are those of the RequestError that the server sent."""

    @classmethod
    def of(cls, error: RequestError) -> VideoStreamError:
        """`error` as the class for its kind."""
        return _CLASSES.get(error.kind, ServerFailedError)(error.kind, error.message)


class InvalidRequestError(VideoStreamError):
    """The request is invalid (for example, an empty prompt). The session continues as if it had not been sent."""


class ForbiddenError(VideoStreamError):
    """The session token is not the one sent with START, or a proxy does not accept the access token."""


class RateLimitedError(VideoStreamError):
    """Too many requests of one session in a second. The session continues as if this one had not been sent."""


class UnknownSessionError(VideoStreamError):
    """The session is not live on this server: it has ended, or was idle for too long and lost its slot."""


class SessionExistsError(VideoStreamError):
    """A session with this id is already live."""


class FrameLimitError(VideoStreamError):
    """The video has reached the length at which the `base` variant ends."""


class SessionCancelledError(VideoStreamError):
    """The session was cancelled, by `cancel()` or by the server."""


class ServerShutdownError(VideoStreamError):
    """The server is shutting down."""


class UnavailableError(VideoStreamError):
    """The server has no free slot: retry after the time in the message."""


class ServerFailedError(VideoStreamError):
    """The server, or Triton itself, failed."""


class StallError(VideoStreamError):
    """No response for `stall_timeout` seconds while one is expected."""

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
