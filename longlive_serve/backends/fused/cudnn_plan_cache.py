# SPDX-License-Identifier: Apache-2.0
"""What takes long to build, in files of the user's cache folder: the next start finds it there.

Used for cuDNN's plans. Whoever asks puts into the key all that an entry depends on.
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
    """Entries by key. A file that is torn, or another key's, counts as none; a folder that cannot be written holds
    none."""

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
        log.warning("cache: %s is damaged: building anew", path)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Whoever reads meanwhile sees the whole entry or none."""
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
            log.info("cache: %s: the next start builds it again", error)

    def _path(self, key: str) -> Path:
        return self._folder / hashlib.sha256(key.encode()).hexdigest()


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(b"\0".join((key.encode(), data))).digest()
