# SPDX-License-Identifier: Apache-2.0
"""Cores, memory, shared memory, open files: what the process may use of the machine. Linux alone.

Called by the command line; the checks of memory are told how much there is.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from longlive_serve.config.presets import ModelConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor.check_result import OK, PROBLEM, WARNING, CheckResult, size
from longlive_serve.doctor.memory_model import session_memory

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
PROC, MOUNTS, MEMINFO = Path("/proc"), Path("/proc/self/mounts"), Path("/proc/meminfo")
SHARED_MEMORY = Path("/dev/shm")
UNLIMITED = 2**60  # cgroup v1 has a number for it
TRITON_REGION = 2**20  # of a model's shared memory: its size at first, and what it grows by
TRITON_FILES = 128  # that Triton opens without any client, rounded up; every connection is one more


def results(config: ServeConfig | None) -> list[CheckResult]:
    """`config`: None where the settings cannot be read."""
    return [cores(), main_memory(), shared_memory(config), *leftovers(), open_files(config)]


def usable_memory() -> float:
    """Bytes of main memory that this process may use."""
    return min(memory_total(), cgroup_memory())


def cores() -> CheckResult:
    """The cores that this process may use, by affinity and by quota."""
    allowed, quota = len(os.sched_getaffinity(0)), cpu_quota()
    usable = min(float(allowed), quota)
    text = f"{usable:.3g} usable"
    if usable < (os.cpu_count() or 1):
        by = "the cgroup's quota" if quota < allowed else "the affinity of this process"
        text += f" of {os.cpu_count()}, by {by}"
    if usable < 2:
        return CheckResult(WARNING, "CPU cores", text, "give it two or more: one generates, one encodes and sends")
    return CheckResult(OK, "CPU cores", text)


def main_memory() -> CheckResult:
    total, limit = memory_total(), cgroup_memory()
    if limit < total:
        return CheckResult(OK, "main memory", f"{size(limit)} by the cgroup's limit, of {size(total)}")
    return CheckResult(OK, "main memory", size(total))


def memory_total() -> int:
    """Of the machine."""
    fields = (line.split() for line in MEMINFO.read_text(encoding="utf-8").splitlines())
    return next(int(field[1]) * 1024 for field in fields if field[0] == "MemTotal:")


def cgroup_memory() -> float:
    """The least of the limits on this process; infinity where there is none."""
    limits = [_first_number(folder / name) for folder, name in _cgroup_files("memory.max", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit < UNLIMITED), default=math.inf)


def cpu_quota() -> float:
    """The least number of cores that a quota grants; infinity where there is none."""
    quotas = [math.inf]
    for folder, name in _cgroup_files("cpu.max", "cpu.cfs_quota_us"):
        if name == "cpu.max":
            quota, period = _first_number(folder / name), _first_number(folder / name, 1)
        else:
            quota, period = _first_number(folder / name), _first_number(folder / "cpu.cfs_period_us")
        if 0 < quota < math.inf and 0 < period < math.inf:
            quotas.append(quota / period)
    return min(quotas)


def _cgroup_files(second: str, first: str) -> Iterator[tuple[Path, str]]:
    """Where a limit may stand: a folder and the name of the file in it, of cgroup version 2 (`second`) or 1."""
    lines = OWN_CGROUPS.read_text(encoding="utf-8").splitlines() if OWN_CGROUPS.is_file() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        root, name = (CGROUPS / controllers, first) if controllers else (CGROUPS, second)
        below = root / path.lstrip("/")
        for folder in (below, *below.parents):
            if folder.is_relative_to(root) and (folder / name).is_file():
                yield folder, name


def _first_number(file: Path, place: int = 0) -> float:
    words = file.read_text(encoding="utf-8").split() if file.is_file() else []
    return float(words[place]) if place < len(words) and words[place].lstrip("-").isdecimal() else math.inf


def shared_memory(config: ServeConfig | None) -> CheckResult:
    """Triton and the model's process share one region, which grows to the largest message and never shrinks."""
    if not SHARED_MEMORY.is_dir():
        return CheckResult(PROBLEM, "/dev/shm", "is not there", "mount a tmpfs of 64 MB or more on it")
    usage = shutil.disk_usage(SHARED_MEMORY)
    need = region_bytes(config.model_config) if config else TRITON_REGION
    text = f"{size(usage.free)} free of {size(usage.total)}; Triton's region takes {size(need)} or less"
    if usage.free < need:
        action = "make it larger: --shm-size=256m in Docker, an emptyDir with medium: Memory in Kubernetes"
        return CheckResult(PROBLEM, "/dev/shm", text, action)
    kinds = {line.split()[1]: line.split()[2] for line in MOUNTS.read_text(encoding="utf-8").splitlines()}
    if kinds.get("/dev/shm", "tmpfs") != "tmpfs":
        text += f"; it is {kinds['/dev/shm']}, no RAM disk"
        return CheckResult(WARNING, "/dev/shm", text, "mount a tmpfs on it: frames pass through it")
    return CheckResult(OK, "/dev/shm", text)


def region_bytes(config: ModelConfig) -> int:
    """The frames of a chunk and the snapshot that goes with them, and what it began with."""
    height, width = config.video_size
    frames = 4 * config.window.chunk * height * width * 3
    snapshot = session_memory(config, "float32").latents
    return (math.ceil((frames + snapshot) / TRITON_REGION) + 1) * TRITON_REGION


def leftovers() -> list[CheckResult]:
    """Regions of servers that were killed with all that watched over them. The launcher's process is in the name."""
    dead: dict[str, int] = {}
    for region in SHARED_MEMORY.glob("longlive_*_*"):
        number = region.name.split("_")[1]
        if number.isdecimal() and not (PROC / number).exists():
            dead[number] = dead.get(number, 0) + region.stat().st_size
    if not dead:
        return []
    text = f"{size(sum(dead.values()))} left in /dev/shm by {len(dead)} server{'s' * (len(dead) > 1)} that are no more"
    files = " ".join(f"{SHARED_MEMORY}/longlive_{number}_*" for number in sorted(dead))
    return [CheckResult(WARNING, "leftovers", text, f"rm {files}")]


def open_files(config: ServeConfig | None) -> CheckResult:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = config or ServeConfig()
    slots, waiting = config.slots, config.max_waiting
    need = TRITON_FILES + 2 * (slots + waiting)  # a viewer who resumes comes before the old connection has gone
    text = f"up to {'any number' if soft == resource.RLIM_INFINITY else soft}; "
    text += f"{slots} sessions and {waiting} that wait take about {need}"
    if soft == resource.RLIM_INFINITY or soft >= need:
        return CheckResult(OK, "open files", text)
    within = hard == resource.RLIM_INFINITY or hard >= need
    action = f"ulimit -n {need}" if within else f"raise the hard limit of {hard} (Docker: --ulimit nofile={need})"
    return CheckResult(WARNING, "open files", text, action)
