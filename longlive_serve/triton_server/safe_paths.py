# SPDX-License-Identifier: Apache-2.0
"""Symbolic links with plain names, for paths that Triton and its Python cannot handle.

Triton inserts paths into a shell command, and the Python in its stub uses ASCII in every locale.
Files at other paths are linked into the server's scratch folder.

Used by `launcher.py`, `find_triton.py` and the doctor.
"""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from longlive_serve.protocol.errors import ServerStartError

SAFE = re.compile(r"[A-Za-z0-9_./+=@%-]+")
SCRATCH_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # tried after $TMPDIR


def is_safe(path: Path | str) -> bool:
    return SAFE.fullmatch(str(path)) is not None


def make_scratch() -> Path:
    """A new folder at a safe path. Raises ServerStartError."""
    errors = []
    for folder in dict.fromkeys((os.environ.get("TMPDIR") or SCRATCH_FOLDERS[0], *SCRATCH_FOLDERS)):
        if is_safe(Path(folder).absolute()):
            try:
                return Path(tempfile.mkdtemp(prefix="longlive-serve-", dir=Path(folder).absolute()))
            except OSError as error:
                errors.append(f"{folder} ({error.strerror})")
        else:
            errors.append(f"{folder} (Triton only takes paths of A-Z a-z 0-9 _ . / + = @ % -)")
    raise ServerStartError(f"no folder for temporary files: tried {', '.join(errors)}; set TMPDIR to a writable one")


class SafePaths:
    """Links in a scratch folder, and their targets."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._names: dict[str, str] = {}

    def safe(self, path: Path) -> Path:
        """`path` itself, or a link to it."""
        if is_safe(path):
            return path
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", path.name)[-64:]  # keeps the suffix, which may be the format
        link = self._scratch / f"link{len(self._names)}" / plain
        links = {name: Path(link) for link, name in self._names.items()}
        if str(path) in links:
            return links[str(path)]
        link.parent.mkdir()
        link.symlink_to(path)
        self._names[str(link)] = str(path)
        return link

    def rename(self, text: str) -> str:
        """A log line, text or JSON, with the original paths instead of the links."""
        for link, name in self._names.items():
            text = text.replace(link, json.dumps(name)[1:-1] if text.startswith("{") else name)
        return text

    def python(self) -> tuple[Path, Path]:
        """The folder of the `python3` whose packages the model imports, and its working folder, like this process's."""
        package = Path(__file__).resolve().parents[2]
        folders = (Path(sys.prefix), Path(sys.base_prefix), package, *_package_folders())
        if all(is_safe(folder) for folder in folders):
            return Path(sys.executable).parent, package
        return self._environment(), self._scratch

    def _environment(self) -> Path:
        """A virtual environment of links: its package folder names those of this process."""
        base, environment = self.safe(Path(sys.base_prefix)), self._scratch / "python"
        # With all links resolved: one such as `python3` might lead out of the linked folder.
        own = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
        home = base / own.parent.relative_to(Path(sys.base_prefix).resolve())
        packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
        packages.mkdir(parents=True)
        (environment / "bin").mkdir()
        (environment / "bin" / "python3").symlink_to(home / own.name)
        (environment / "pyvenv.cfg").write_text(
            f"home = {home}\ninclude-system-site-packages = false\n", encoding="ascii"
        )
        folders = (str(self.safe(folder)) for folder in _package_folders())
        (packages / "links.pth").write_text("\n".join([*folders, ""]), encoding="ascii")
        return environment / "bin"


def _package_folders() -> Iterator[Path]:
    """The folders from which this process imports, without those of the standard library."""
    own = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    own |= {folder / "lib-dynload" for folder in own}
    yield Path(__file__).resolve().parents[2]
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry or ".").absolute()
        if folder.is_dir() and folder not in own:
            yield folder
