# SPDX-License-Identifier: Apache-2.0
"""The doctor's checks of a machine: GPUs, cores, memory, shared memory, open files and ports."""

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
from longlive_serve.doctor.check_result import ERROR, NOTE, OK, WARNING, CheckResult, format_bytes

H200 = gpu.Gpu(name="NVIDIA H200", memory=143771 << 20, free=143000 << 20, driver="580.95.05", capability=(9, 0))
FULL = ServeConfig(preset="longlive-1.3b")


def levels(results: Sequence[CheckResult]) -> dict[str, str]:
    for result in results:
        assert result.action or result.level == OK, result
    return {result.name: result.level for result in results}


def only(results: Sequence[CheckResult], name: str) -> CheckResult:
    (found,) = [result for result in results if result.name == name]
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
    results = gpu.check_gpu(gpus, used, "auto")
    assert levels(results) == {"GPU": OK, "FP8": OK, "CUDA": OK}
    assert "NVIDIA H200, 140.4 GiB, compute capability 9.0, driver 580.95.05" in only(results, "GPU").message


def test_an_old_gpu_that_others_use_and_that_pytorch_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA A100-SXM4-80GB, 81920, 1024, 525.60.13, 8.0, GPU-{}"
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, line.format("a"), line.format("b"))
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "13.0")
    found = gpu.check_gpu(gpus, gpus[0], "auto")
    assert levels(found) == {"GPU": OK, "GPUs": NOTE, "GPU memory": WARNING, "FP8": NOTE, "CUDA": ERROR}
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "")
    assert only(gpu.check_gpu(gpus, gpus[0], "auto"), "CUDA").level == WARNING
    assert only(gpu.check_gpu(gpus, gpus[0], "cuda"), "CUDA").level == ERROR


def test_the_settings_and_cuda_visible_devices_choose_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, *(f"GPU {n}, 9000, 9000, 580.1, 9.0, GPU-{n}{n}" for n in "012"))
    first, second, third = gpus
    assert gpu.select_gpu(gpus, "auto") is first
    assert gpu.select_gpu(gpus, "cuda:2") is third
    assert gpu.select_gpu(gpus, "cpu") is None
    assert levels(gpu.check_gpu(gpus, None, "cpu")) == {"GPU": NOTE}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-11")
    assert gpu.select_gpu(gpus, "cuda") is third
    assert gpu.select_gpu(gpus, "cuda:1") is second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.select_gpu(gpus, "cuda") is None
    assert levels(gpu.check_gpu(gpus, None, "cuda")) == {"GPU": ERROR}


def test_no_gpu_is_a_problem_only_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PCI_DEVICES", tmp_path)
    assert [gpu.check_gpu([], None, device)[0].level for device in ("auto", "cuda")] == [NOTE, ERROR]
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    result = gpu.check_gpu([], None, "auto")[0]
    assert (result.level, "no driver answers" in result.message) == (WARNING, True)


def test_without_nvidia_smi_pytorch_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
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
    assert (gpus[0].name, gpus[0].has_fp8) == ("NVIDIA H100", True)
    assert gpu.select_gpu(gpus, "cuda") is gpus[0]


# The machine.


def test_limits_of_cgroups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(machine, "CGROUP_FILE", own)
    own.write_text("0::/pod/me\n")
    folder = tmp_path / "pod" / "me"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    (folder / "memory.max").write_text("max\n")
    assert (machine.cgroup_cores(), machine.cgroup_memory()) == (float("inf"), float("inf"))
    assert machine.check_main_memory().message == format_bytes(machine.total_memory())
    (folder.parent / "cpu.max").write_text("150000 100000\n")  # of a parent
    (folder / "memory.max").write_text(f"{2**30}\n")
    assert (machine.cgroup_cores(), machine.main_memory()) == (1.5, 2**30)
    assert machine.check_main_memory().message.startswith("1.00 GiB by the cgroup's limit")


def test_limits_of_cgroups_of_version_1_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "own"
    monkeypatch.setattr(machine, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(machine, "CGROUP_FILE", own)
    own.write_text("9:name=systemd:/\n4:memory:/pod/me\n1:cpu,cpuacct:/pod\n0::/\n")
    cpu, memory = tmp_path / "cpu,cpuacct/pod", tmp_path / "memory/pod/me"
    cpu.mkdir(parents=True)
    memory.mkdir(parents=True)
    (cpu / "cpu.cfs_period_us").write_text("100000\n")
    (cpu / "cpu.cfs_quota_us").write_text("-1\n")
    (memory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert (machine.cgroup_cores(), machine.cgroup_memory()) == (float("inf"), float("inf"))
    (cpu / "cpu.cfs_quota_us").write_text("250000\n")
    (memory.parent / "memory.limit_in_bytes").write_text(f"{2**31}\n")  # of a parent
    assert (machine.cgroup_cores(), machine.cgroup_memory()) == (2.5, 2**31)


def test_one_core_is_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 8.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert machine.check_cores().level == OK
    monkeypatch.setattr(machine, "cgroup_cores", lambda: 0.5)
    assert (machine.check_cores().level, "0.5 usable" in machine.check_cores().message) == (WARNING, True)


def test_shared_memory_must_hold_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.region_bytes(PRESETS["longlive-1.3b"]) == 21 << 20  # 14.4 MB of frames, 5.7 of a snapshot
    for free, level in ((64 << 20, OK), (8 << 20, ERROR)):
        usage = SimpleNamespace(total=64 << 20, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        assert machine.check_shared_memory(FULL).level == level
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.check_shared_memory(FULL).level == ERROR


def test_regions_of_dead_servers_are_found_and_those_of_living_ones_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    (tmp_path / f"longlive_{os.getpid()}_ab_1").write_bytes(b"x")
    assert machine.check_regions() == []
    (tmp_path / "longlive_99999999_ab_1").write_bytes(b"x" * 2048)
    (result,) = machine.check_regions()
    assert (result.level, result.action) == (WARNING, f"rm {tmp_path}/longlive_99999999_*")
    assert "2 KiB" in result.message


def test_open_files_must_do_for_all_who_come(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {(4096, 4096): "", (resource.RLIM_INFINITY,) * 2: "", (100, 4096): "ulimit -n 176", (100, 100): "raise"}
    for limit, action in limits.items():
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: limit)
        result = machine.check_open_files(ServeConfig())
        assert result.action.startswith(action)
        assert result.level == (WARNING if action else OK)


def test_a_port_in_use_is_reported_with_what_to_do() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        (result,) = ports.check_ports("127.0.0.1", {"grpc": port, "http": 0})
    assert result.level == ERROR
    assert result.message == f"port {port} (gRPC): in use on 127.0.0.1"
    assert result.action.endswith("--grpc-port")
    assert levels(ports.check_ports("127.0.0.1", {"grpc": 0, "http": 0})) == {"ports": OK}


@pytest.mark.parametrize(
    ("host", "wanted"), [("no.such.host.invalid", (0, 0)), ("", (0, 0)), ("0", (0, 0)), ("127.0.0.1", (8123, 8123))]
)
def test_ports_that_cannot_be(host: str, wanted: tuple[int, int]) -> None:
    found = ports.check_ports(host, dict(zip(("grpc", "http"), wanted, strict=True)))
    assert levels(found) == {"ports" if host == "127.0.0.1" else "host": ERROR}
