# SPDX-License-Identifier: Apache-2.0
"""Errors that cross the wire, raised by everyone who serves and raised again by the client; and that of a server that
does not start."""

from __future__ import annotations

import re
from typing import ClassVar


class ServerStartError(RuntimeError):
    """The server cannot be found, started or reached; the message says what to do about it."""


class RequestError(Exception):
    """An error that crosses the wire as `[kind] message`; the client raises it again under the same kind."""

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
        """The error that `text` (an error message off the wire) carries; INTERNAL when it is not one of ours."""
        kinds = {value for name, value in vars(RequestError).items() if name.isupper()}
        found = re.search(rf"\[({'|'.join(sorted(kinds))})\] (.*)", text, re.DOTALL)  # Triton may put words before it
        if found:
            return cls(found[1], found[2])
        if "must specify the START flag" in text:  # Triton's own words: it knows no such sequence
            return cls(cls.UNKNOWN_SESSION, text)
        if "stopped accepting new inference requests" in text:  # it was told to end
            return cls(cls.SHUTTING_DOWN, text)
        return cls(cls.INTERNAL, text)


def invalid(message: str) -> RequestError:
    """The error for a request that is wrong; `message` says what was got and what was expected."""
    return RequestError(RequestError.INVALID_REQUEST, message)


def _without_surrogates(text: str) -> str:
    """File names may have some for their bytes, and JSON any; no message can carry them."""
    try:
        return text.encode(errors="surrogateescape").decode(errors="replace")
    except UnicodeEncodeError:
        return text.encode(errors="replace").decode()
