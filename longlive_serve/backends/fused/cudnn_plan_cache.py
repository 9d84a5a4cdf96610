# SPDX-License-Identifier: Apache-2.0
"""A disk cache in the user's cache folder for data that takes long to build.

Used for cuDNN plans. The caller's key must contain everything that an entry depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "longlive-serve")


class PlanCache:
    """Entries by key. A damaged file, or one of another key, counts as missing. Write errors are only logged."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        size = hashlib.sha256().digest_size
        if data[:size] == _digest(key, data[size:]):
            return data[size:]
        log.warning("cache: %s is damaged: building it again", path)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Write atomically: concurrent readers see the whole entry or none."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
                try:
                    file.write(_digest(key, data) + data)
                    file.close()
                    os.replace(file.name, path)
                except OSError:
                    with contextlib.suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            log.info("cache: cannot write (%s): the next start builds it again", error)

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((key.encode(), data))).digest()
