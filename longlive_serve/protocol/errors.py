# SPDX-License-Identifier: Apache-2.0
"""Errors: `RequestError`, which the server sends and the client raises again, and `ServerStartError`."""

from __future__ import annotations

import re
from typing import ClassVar


class ServerStartError(RuntimeError):
    """The server cannot be found, started or reached; the message says what to do."""


class RequestError(Exception):
    """An error that is sent as `[kind] message`; the client raises it again with the same kind."""

    INVALID_REQUEST: ClassVar[str] = "invalid_request"
    FORBIDDEN: ClassVar[str] = "forbidden"
    RATE_LIMITED: ClassVar[str] = "rate_limited"
    UNKNOWN_SESSION: ClassVar[str] = "unknown_session"
    SESSION_EXISTS: ClassVar[str] = "session_exists"
    FRAME_LIMIT: ClassVar[str] = "frame_limit"
    CANCELLED: ClassVar[str] = "cancelled"
    SHUTTING_DOWN: ClassVar[str] = "shutting_down"
    UNAVAILABLE: ClassVar[str] = "unavailable"
    INTERNAL: ClassVar[str] = "internal"

    def __init__(self, kind: str, message: str) -> None:
        message = _without_surrogates(message)
        super().__init__(f"[{kind}] {message}")
        self.kind = kind
        self.message = message

    @classmethod
    def parse(cls, text: str) -> RequestError:
        """The error in `text`, a received error message; INTERNAL if its kind is unknown."""
        kinds = {value for name, value in vars(RequestError).items() if name.isupper()}
        found = re.search(rf"\[({'|'.join(sorted(kinds))})\] (.*)", text, re.DOTALL)  # Triton may add a prefix
        if found:
            return cls(found[1], found[2])
        if "must specify the START flag" in text:  # Triton's message for an unknown sequence
            return cls(cls.UNKNOWN_SESSION, text)
        if "stopped accepting new inference requests" in text:  # Triton's message after SIGTERM
            return cls(cls.SHUTTING_DOWN, text)
        return cls(cls.INTERNAL, text)


def invalid(message: str) -> RequestError:
    """INVALID_REQUEST; `message` names the field, what was got and what was expected."""
    return RequestError(RequestError.INVALID_REQUEST, message)


def _without_surrogates(text: str) -> str:
    """Surrogates come from file names and JSON; they cannot be encoded as UTF-8."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
