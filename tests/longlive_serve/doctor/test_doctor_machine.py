# SPDX-License-Identifier: Apache-2.0
"""What the doctor finds of a machine: its GPUs, cores, memory, shared memory, open files and ports."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor import gpu, machine, ports
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult, size

H200 = gpu.Gpu(name="NVIDIA H200", memory=143771 << 20, free=143000 << 20, driver="580.95.05", capability=(9, 0))
FULL = ServeConfig(preset="longlive-1.3b")


def levels(results: Sequence[CheckResult]) -> dict[str, str]:
    for result in results:
        assert result.action or result.level == OK, result
    return {result.subject: result.level for result in results}


def only(results: Sequence[CheckResult], subject: str) -> CheckResult:
    (found,) = [result for result in results if result.subject == subject]
    return found


# The GPU.


def fake_nvidia_smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[gpu.Gpu]:
    program = folder / "nvidia-smi"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return gpu.find_gpus()


def test_a_gpu_is_described_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 143000, 580.95.05, 9.0, GPU-a")
    (used,) = gpus
    assert (used.name, used.memory, used.capability) == ("NVIDIA H200", 143771 << 20, (9, 0))
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "13.0")
    results = gpu.gpu_results(gpus, used, "auto")
    assert levels(results) == {"GPU": OK, "FP8": OK, "CUDA": OK}
    assert "NVIDIA H200, 140.4 GiB, compute capability 9.0, driver 580.95.05" in only(results, "GPU").found


def test_an_old_gpu_that_others_use_and_that_pytorch_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA A100-SXM4-80GB, 81920, 1024, 525.60.13, 8.0, GPU-{}"
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, line.format("a"), line.format("b"))
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "13.0")
    found = gpu.gpu_results(gpus, gpus[0], "auto")
    assert levels(found) == {"GPU": OK, "GPUs": NOTE, "GPU memory": WARNING, "FP8": NOTE, "CUDA": PROBLEM}
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "")
    assert only(gpu.gpu_results(gpus, gpus[0], "auto"), "CUDA").level == WARNING
    assert only(gpu.gpu_results(gpus, gpus[0], "cuda"), "CUDA").level == PROBLEM


def test_the_settings_and_cuda_visible_devices_choose_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, *(f"GPU {n}, 9000, 9000, 580.1, 9.0, GPU-{n}{n}" for n in "012"))
    first, second, third = gpus
    assert gpu.used_gpu(gpus, "auto") is first
    assert gpu.used_gpu(gpus, "cuda:2") is third
    assert gpu.used_gpu(gpus, "cpu") is None
    assert levels(gpu.gpu_results(gpus, None, "cpu")) == {"GPU": NOTE}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-11")
    assert gpu.used_gpu(gpus, "cuda") is third
    assert gpu.used_gpu(gpus, "cuda:1") is second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.used_gpu(gpus, "cuda") is None
    assert levels(gpu.gpu_results(gpus, None, "cuda")) == {"GPU": PROBLEM}


def test_no_gpu_is_a_problem_only_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    assert [gpu.gpu_results([], None, device)[0].level for device in ("auto", "cuda")] == [NOTE, PROBLEM]
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    result = gpu.gpu_results([], None, "auto")[0]
    assert (result.level, "no driver answers" in result.found) == (WARNING, True)


def test_without_nvidia_smi_nvml_or_pytorch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(total=9000 << 20, free=8000 << 20),
        nvmlDeviceGetCudaComputeCapability=lambda handle: (8, 9),
        nvmlDeviceGetName=lambda handle: "NVIDIA L40S",
        nvmlSystemGetDriverVersion=lambda: "580.1",
        nvmlDeviceGetUUID=lambda handle: "GPU-a",
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (found,) = gpu.find_gpus()
    assert (found.name, found.has_fp8) == ("NVIDIA L40S", True)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.find_gpus() == []
    cuda = SimpleNamespace(
        device_count=lambda: 1,
        mem_get_info=lambda index: (1, 2),
        get_device_capability=lambda index: (9, 0),
        get_device_name=lambda index: "NVIDIA H100",
    )
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "13.0")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    gpus = gpu.find_gpus()
    assert gpu.used_gpu(gpus, "cuda") is gpus[0]


# The machine.


def test_limits_of_cgroups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUPS", own)
    own.write_text("0::/pod/me\n")
    folder = tmp_path / "pod" / "me"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    (folder / "memory.max").write_text("max\n")
    assert (machine.cpu_quota(), machine.cgroup_memory()) == (float("inf"), float("inf"))
    assert machine.main_memory().found == size(machine.memory_total())
    (folder.parent / "cpu.max").write_text("150000 100000\n")  # of a parent
    (folder / "memory.max").write_text(f"{2**30}\n")
    assert (machine.cpu_quota(), machine.usable_memory()) == (1.5, 2**30)
    assert machine.main_memory().found.startswith("1.00 GiB by the cgroup's limit")
    own.write_text("3:cpu,cpuacct:/\n4:memory:/job\n")  # version 1
    for name, text in (("cpu.cfs_quota_us", "200000"), ("cpu.cfs_period_us", "100000")):
        (tmp_path / "cpu,cpuacct").mkdir(exist_ok=True)
        (tmp_path / "cpu,cpuacct" / name).write_text(text)
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert (machine.cpu_quota(), machine.cgroup_memory()) == (2.0, float("inf"))


def test_one_core_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cpu_quota", lambda: 8.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert machine.cores().level == OK
    monkeypatch.setattr(machine, "cpu_quota", lambda: 0.5)
    assert (machine.cores().level, "0.5 usable" in machine.cores().found) == (WARNING, True)


def test_shared_memory_must_hold_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.region_bytes(PRESETS["longlive-1.3b"]) == 21 << 20  # 14.4 MB of frames, 5.7 of a snapshot
    for free, level in ((64 << 20, OK), (8 << 20, PROBLEM)):
        usage = SimpleNamespace(total=64 << 20, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert machine.shared_memory(FULL).level == level
    mounts = tmp_path / "mounts"
    mounts.write_text("overlay /dev/shm overlay rw 0 0\n")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**40, free=2**40))
    monkeypatch.setattr(machine, "MOUNTS", mounts)
    assert machine.shared_memory(FULL).level == WARNING
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.shared_memory(FULL).level == PROBLEM


def test_regions_of_dead_servers_are_found_and_those_of_living_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    (tmp_path / f"longlive_{os.getpid()}_ab_1").write_bytes(b"x")
    assert machine.leftovers() == []
    (tmp_path / "longlive_99999999_ab_1").write_bytes(b"x" * 2048)
    (result,) = machine.leftovers()
    assert (result.level, result.action) == (WARNING, f"rm {tmp_path}/longlive_99999999_*")
    assert "2 KiB" in result.found


def test_open_files_must_do_for_all_who_come(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {(4096, 4096): "", (resource.RLIM_INFINITY,) * 2: "", (100, 4096): "ulimit -n 176", (100, 100): "raise"}
    for limit, action in limits.items():
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: limit)
        result = machine.open_files(ServeConfig())
        assert result.action.startswith(action)
        assert result.level == (WARNING if action else OK)


def test_a_taken_port_says_who_has_it() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        (result,) = ports.ports("127.0.0.1", {"grpc": port, "http": 0})
    assert result.level == PROBLEM
    assert result.subject == f"port {port}"
    assert (
        f"gRPC: in use on 127.0.0.1 by {Path('/proc/self/comm').read_text(encoding='utf-8').strip()} (process"
        in result.found
    )
    assert result.action.endswith("--grpc-port")
    assert levels(ports.ports("127.0.0.1", {"grpc": 0, "http": 0})) == {"ports": OK}


@pytest.mark.parametrize(
    ("host", "wanted"), [("no.such.host.invalid", (0, 0)), ("", (0, 0)), ("0", (0, 0)), ("127.0.0.1", (8123, 8123))]
)
def test_ports_that_cannot_be(host: str, wanted: tuple[int, int]) -> None:
    found = ports.ports(host, dict(zip(("grpc", "http"), wanted, strict=True)))
    assert levels(found) == {"ports" if host == "127.0.0.1" else "host": PROBLEM}
