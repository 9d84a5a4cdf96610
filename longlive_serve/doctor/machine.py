# SPDX-License-Identifier: Apache-2.0
"""CPU cores, main memory, shared memory and open files that this process may use. Linux only.

Called by the command line. The check of memory gets the size of main memory.
"""

from __future__ import annotations

import math
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from longlive_serve.config.presets import ModelConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor.check_result import ERROR, OK, WARNING, CheckResult, format_bytes
from longlive_serve.doctor.memory_model import session_memory

CGROUP_ROOT, CGROUP_FILE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNLIMITED = 2**60  # cgroup version 1 reports a larger number where there is no limit
PROC, SHARED_MEMORY = Path("/proc"), Path("/dev/shm")
TRITON_REGION = 2**20  # of a model's shared memory: its initial size, and the step by which it grows
TRITON_FILES = 128  # that Triton opens without any client, rounded up; each connection is one more


def check_machine(config: ServeConfig | None) -> list[CheckResult]:
    """`config`: None where the settings cannot be read."""
    return [check_cores(), check_main_memory(), check_shared_memory(config), *check_regions(), check_open_files(config)]


def main_memory() -> float:
    """Bytes of main memory that this process may use."""
    return min(total_memory(), cgroup_memory())


def check_cores() -> CheckResult:
    """By affinity and by the quota of the cgroup."""
    affinity, quota = len(os.sched_getaffinity(0)), cgroup_cores()
    cores = min(float(affinity), quota)
    message = f"{cores:.3g} usable"
    if cores < (os.cpu_count() or 1):
        limit = "the cgroup's quota" if quota < affinity else "the affinity of this process"
        message += f" of {os.cpu_count()}, by {limit}"
    if cores < 2:
        action = "provide two or more: one for generation, one to encode and send"
        return CheckResult(WARNING, "CPU cores", message, action)
    return CheckResult(OK, "CPU cores", message)


def check_main_memory() -> CheckResult:
    total, limit = total_memory(), cgroup_memory()
    if limit < total:
        message = f"{format_bytes(limit)} by the cgroup's limit, of {format_bytes(total)}"
        return CheckResult(OK, "main memory", message)
    return CheckResult(OK, "main memory", format_bytes(total))


def total_memory() -> int:
    """Bytes of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cgroup_memory() -> float:
    """The smallest memory limit of this process's cgroups; infinity where there is none."""
    limits = [limit for (limit,) in _cgroup_limits(("memory.max",), ("memory.limit_in_bytes",))]
    return min((limit for limit in limits if limit < UNLIMITED), default=math.inf)


def cgroup_cores() -> float:
    """The smallest CPU quota of this process's cgroups, in cores; infinity where there is none."""
    limits = _cgroup_limits(("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    return min((quota / period for quota, period in limits if quota > 0), default=math.inf)


def _cgroup_limits(version_2: Sequence[str], version_1: Sequence[str]) -> Iterator[list[float]]:
    """The numbers in these files of the process's cgroups and their parents; "max" is infinity."""
    lines = CGROUP_FILE.read_text(encoding="utf-8").splitlines() if CGROUP_FILE.is_file() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        root, names = (CGROUP_ROOT / controllers, version_1) if controllers else (CGROUP_ROOT, version_2)
        folder = root / path.lstrip("/")
        for parent in (folder, *folder.parents):
            files = [parent / name for name in names]
            if parent.is_relative_to(root) and all(file.is_file() for file in files):
                fields = " ".join(file.read_text(encoding="utf-8") for file in files).split()
                yield [math.inf if field == "max" else float(field) for field in fields]


def check_shared_memory(config: ServeConfig | None) -> CheckResult:
    """Triton and the model's process share one region, which grows to the largest message and never shrinks."""
    if not SHARED_MEMORY.is_dir():
        return CheckResult(ERROR, "/dev/shm", "not found", "mount a tmpfs of 64 MB or more on it")
    usage = shutil.disk_usage(SHARED_MEMORY)
    required = region_bytes(config.model_config) if config else TRITON_REGION
    message = f"{format_bytes(usage.free)} free of {format_bytes(usage.total)}; "
    message += f"Triton needs up to {format_bytes(required)}"
    if usage.free < required:
        action = "increase it: --shm-size=256m in Docker, an emptyDir with medium: Memory in Kubernetes"
        return CheckResult(ERROR, "/dev/shm", message, action)
    return CheckResult(OK, "/dev/shm", message)


def region_bytes(config: ModelConfig) -> int:
    """The largest size of the region: a chunk's frames and the snapshot that comes with them, and the initial size."""
    height, width = config.video_size
    frames = 4 * config.window.chunk * height * width * 3
    snapshot = session_memory(config, "float32").latents
    return (math.ceil((frames + snapshot) / TRITON_REGION) + 1) * TRITON_REGION


def check_regions() -> list[CheckResult]:
    """Shared memory of servers that were killed together with their guard. Its name contains the launcher's pid."""
    stale: dict[str, int] = {}
    for region in SHARED_MEMORY.glob("longlive_*_*"):
        pid = region.name.split("_")[1]
        if pid.isdecimal() and not (PROC / pid).exists():
            stale[pid] = stale.get(pid, 0) + region.stat().st_size
    if not stale:
        return []
    message = f"{format_bytes(sum(stale.values()))} in /dev/shm belong to servers that no longer run"
    files = " ".join(f"{SHARED_MEMORY}/longlive_{pid}_*" for pid in sorted(stale))
    return [CheckResult(WARNING, "stale regions", message, f"rm {files}")]


def check_open_files(config: ServeConfig | None) -> CheckResult:
    soft_limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = config or ServeConfig()
    sessions = config.slots + config.max_waiting
    required = TRITON_FILES + 2 * sessions  # a client that resumes may connect before its old connection is closed
    message = f"limit {'none' if soft_limit == resource.RLIM_INFINITY else soft_limit}; "
    message += f"{config.slots} sessions and {config.max_waiting} in the queue need about {required}"
    if soft_limit == resource.RLIM_INFINITY or soft_limit >= required:
        return CheckResult(OK, "open files", message)
    action = f"ulimit -n {required}"
    if hard_limit != resource.RLIM_INFINITY and hard_limit < required:
        action = f"raise the hard limit of {hard_limit} (Docker: --ulimit nofile={required})"
    return CheckResult(WARNING, "open files", message, action)
