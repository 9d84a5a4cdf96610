# SPDX-License-Identifier: Apache-2.0
"""Rules of the layout: which folder may import which, and how many entries a folder may have."""

from __future__ import annotations

import subprocess
import sys

from tests.support.rooms import ROOT, entries, floor_of, imports, room_of

MOST_ENTRIES = 12
NUMPY_ONLY = """
import importlib, pkgutil, sys
ALLOWED = {*sys.stdlib_module_names, "numpy", "longlive_serve"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in ALLOWED:
            raise ImportError(f"{name} is neither Python's own nor NumPy")
sys.meta_path.insert(0, Refuse())
import longlive_serve.config, longlive_serve.protocol
for package in (longlive_serve.config, longlive_serve.protocol):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)
"""


def test_imports_point_to_lower_floors() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if room_of(other) != room_of(module) and floor_of(other) >= floor_of(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_has_more_doors_than_a_reader_can_look_behind() -> None:
    full = {folder: len(names) for folder, names in entries().items() if len(names) > MOST_ENTRIES}
    assert full == {}


def test_the_wire_and_the_settings_need_numpy_only() -> None:
    subprocess.run([sys.executable, "-c", NUMPY_ONLY], cwd=ROOT, check=True)
