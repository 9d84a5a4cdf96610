# SPDX-License-Identifier: Apache-2.0
"""The doctor: what it finds well and not well, on machines that are faked, and whole reports of this one."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from longlive_serve.config import DIT, PRESETS, TEXT_ENCODER, VAE_DECODER, ServeConfig
from longlive_serve.doctor import __main__ as command
from longlive_serve.doctor import engines, gpu, machine, memory, ports, settings, software
from longlive_serve.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding, Section, lines_of, size
from longlive_serve.engines.graph_files import GraphFile, Manifest, sizes_of
from longlive_serve.sizing import GIB
from longlive_serve.triton_install import ServerError
from longlive_serve.weights import DIT_FILE, QUANTIZED_FILE, TOKENIZER_FOLDER, VAE_FILE

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "model_repository/longlive/1/serve.toml"
H200 = gpu.Gpu(name="NVIDIA H200", memory=143771 << 20, free=143000 << 20, driver="580.95.05", capability=(9, 0))
FULL = ServeConfig(preset="longlive-1.3b")
NO_ENGINE = dict.fromkeys((TEXT_ENCODER, DIT, VAE_DECODER), "torch")


def levels(findings: Sequence[Finding]) -> dict[str, str]:
    for finding in findings:
        assert finding.action or finding.level == OK, finding
    return {finding.subject: finding.level for finding in findings}


def only(findings: Sequence[Finding], subject: str) -> Finding:
    (found,) = [finding for finding in findings if finding.subject == subject]
    return found


# The report as text.


def test_lines_are_aligned_and_no_wider_than_asked_and_coloured_only_when_asked() -> None:
    findings = [Finding(OK, "short", "well"), Finding(PROBLEM, "a longer one", "bad " * 30, "do this " * 12)]
    lines = list(lines_of([Section("Title", findings)], 60, colours=False))
    assert max(map(len, lines)) <= 60
    assert lines[:2] == ["Title", "  ok       short         well"]
    assert all(line.startswith(" " * 25) for line in lines[3:-1])
    coloured = list(lines_of([Section("Title", findings)], 60, colours=True))
    assert "\033[1;31mproblem\033[0m" in coloured[2]
    assert [line.replace("\033[32mok\033[0m", "ok") for line in coloured][1] == lines[1]


def test_bytes_are_in_words() -> None:
    assert [size(n) for n in (12, 2**20, 1.76 * GIB, 140.4 * GIB)] == ["12 B", "1 MiB", "1.76 GiB", "140.4 GiB"]


# Software.


def test_missing_packages_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "5.0.0", "safetensors": "0.8.0", "ftfy": "6.3.1"}
    monkeypatch.setattr(software, "version_of", lambda package: versions.get(package, ""))
    findings = software.software()
    assert levels(findings) == {
        "Python": OK, "longlive-serve": OK, "serving": NOTE, "client": NOTE, "encoding": NOTE, "ONNX Runtime": NOTE,
        "export": NOTE, "quantization": NOTE, "plots": NOTE,
    }  # fmt: skip
    assert "transformers 5.0.0 (tested with" in only(findings, "serving").found
    assert "pip install --editable '.[client]'" in only(findings, "client").action
    del versions["torch"]
    missing = only(software.software(), "serving")
    assert (missing.level, missing.found) == (PROBLEM, "missing: torch")


def test_extras_are_the_same_from_the_checkout_and_as_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkout = software.pinned()
    assert checkout["client"].keys() == {"tritonclient", "av", "rich"}
    monkeypatch.setattr(software, "PYPROJECT", tmp_path / "none")
    lines = [
        f'{name}=={version}; extra == "{extra}"' for extra, pins in checkout.items() for name, version in pins.items()
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda project: ["numpy>=1.26", *lines])
    assert software.pinned() == checkout
    assert software.pip_install("torch") == "pip install 'longlive-serve[torch]'"


def triton_with(folder: Path, monkeypatch: pytest.MonkeyPatch, stub: bytes | None) -> Finding:
    """A `tritonserver` on PATH, whose Python backend's stub holds these bytes."""
    binary = folder / "bin" / "tritonserver"
    backend = folder / "backends" / "python"
    for path in (binary.parent, backend):
        path.mkdir(parents=True, exist_ok=True)
    binary.write_text("")
    binary.chmod(0o755)
    (folder / "TRITON_VERSION").write_text("2.61.0\n")
    if stub is not None:
        (backend / software.STUB).write_bytes(stub)
    monkeypatch.setenv("PATH", str(binary.parent))
    findings = software.triton_server()
    assert only(findings, "server").found == f"{binary.resolve()}, version 2.61.0"
    return only(findings, "Python backend")


def test_the_backend_must_run_this_version_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"libpython3.{sys.version_info.minor}.so.1.0".encode()
    assert triton_with(tmp_path, monkeypatch, None).level == PROBLEM
    assert triton_with(tmp_path, monkeypatch, b"ELF " + own).level == OK
    assert triton_with(tmp_path, monkeypatch, b"ELF").level == WARNING
    other = triton_with(tmp_path, monkeypatch, b"ELF libpython3.9.so.1.0")
    assert (other.level, other.action) == (PROBLEM, "install them for python3.9, and run this with it")


def test_without_a_server_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(software.triton_server()) == {"server": OK, "Python backend": OK}  # the wheel's

    def none(scratch: Path) -> None:
        raise ServerError("no Triton server: looked everywhere; pip install 'longlive-serve[triton]'")

    monkeypatch.setattr(software, "find_install", none)
    (finding,) = software.triton_server()
    assert finding.level == PROBLEM
    assert finding.found == "no Triton server: looked everywhere"
    assert finding.action == "pip install --editable '.[triton]'"


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
    findings = gpu.gpu_findings(gpus, used, "auto")
    assert levels(findings) == {"GPU": OK, "FP8": OK, "CUDA": OK}
    assert "NVIDIA H200, 140.4 GiB, compute capability 9.0, driver 580.95.05" in only(findings, "GPU").found


def test_an_old_gpu_that_others_use_and_that_pytorch_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "NVIDIA A100-SXM4-80GB, 81920, 1024, 525.60.13, 8.0, GPU-{}"
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, line.format("a"), line.format("b"))
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "13.0")
    found = gpu.gpu_findings(gpus, gpus[0], "auto")
    assert levels(found) == {"GPU": OK, "GPUs": NOTE, "GPU memory": WARNING, "FP8": NOTE, "CUDA": PROBLEM}
    monkeypatch.setattr(gpu, "torch_cuda", lambda: "")
    assert only(gpu.gpu_findings(gpus, gpus[0], "auto"), "CUDA").level == WARNING
    assert only(gpu.gpu_findings(gpus, gpus[0], "cuda"), "CUDA").level == PROBLEM


def test_the_settings_and_cuda_visible_devices_choose_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = fake_nvidia_smi(tmp_path, monkeypatch, *(f"GPU {n}, 9000, 9000, 580.1, 9.0, GPU-{n}{n}" for n in "012"))
    first, second, third = gpus
    assert gpu.used_gpu(gpus, "auto") is first
    assert gpu.used_gpu(gpus, "cuda:2") is third
    assert gpu.used_gpu(gpus, "cpu") is None
    assert levels(gpu.gpu_findings(gpus, None, "cpu")) == {"GPU": NOTE}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-11")
    assert gpu.used_gpu(gpus, "cuda") is third
    assert gpu.used_gpu(gpus, "cuda:1") is second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.used_gpu(gpus, "cuda") is None
    assert levels(gpu.gpu_findings(gpus, None, "cuda")) == {"GPU": PROBLEM}


def test_no_gpu_is_a_problem_only_where_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PCI", tmp_path)
    assert [gpu.gpu_findings([], None, device)[0].level for device in ("auto", "cuda")] == [NOTE, PROBLEM]
    device = tmp_path / "0000:01:00.0"
    device.mkdir()
    (device / "vendor").write_text("0x10de\n")
    (device / "class").write_text("0x030200\n")
    finding = gpu.gpu_findings([], None, "auto")[0]
    assert (finding.level, "no driver answers" in finding.found) == (WARNING, True)


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


# Engines.


def test_engines_need_their_libraries_and_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = levels(engines.engine_findings(engines.here("cpu", None), "cpu"))
    assert on_cpu == {"torch": OK, "fused": NOTE, "onnxruntime": OK, "tensorrt": NOTE}
    assert levels(engines.engine_findings(engines.here("cuda", None), "cuda"))["torch"] == NOTE
    monkeypatch.setattr(engines, "torch_cuda", lambda: "13.0")
    on_gpu = levels(engines.engine_findings(engines.here("cuda", H200), "cuda"))
    assert on_gpu == {"torch": OK, "fused": OK, "onnxruntime": NOTE, "tensorrt": OK}  # it is ONNX Runtime for CPUs
    monkeypatch.setattr(engines, "version_of", lambda package: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torch" or None)
    bare = levels(engines.engine_findings(engines.here("cuda", H200), "cuda"))
    assert bare == {"torch": OK, "fused": NOTE, "onnxruntime": NOTE, "tensorrt": NOTE}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert levels(engines.engine_findings(engines.here("cpu", None), "cpu")) == {"engines": NOTE}


def test_what_the_settings_come_to_and_whether_it_can_run() -> None:
    def found(device: str, used: gpu.Gpu | None, **values: Any) -> dict[str, str]:
        config = ServeConfig(**values)
        return levels(engines.chosen_findings(config, engines.chosen(config), engines.here(device, used), device, used))

    assert found("cpu", None) == {"engines": OK}
    assert found("cpu", None, engine="fused") == {"engines": OK, "engine fused": PROBLEM}
    assert found("cpu", None, preset="longlive-1.3b") == {"engines": OK, "speed": WARNING}
    old = gpu.Gpu(name="A100", memory=1, free=1, driver="", capability=(8, 0))
    assert found("cpu", old, engine="fused", fp8=True, dtype="float16")["fp8"] == PROBLEM
    assert found("cpu", None, graphs="/none") == {}  # the folder is told of elsewhere


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
    (finding,) = machine.leftovers()
    assert (finding.level, finding.action) == (WARNING, f"rm {tmp_path}/longlive_99999999_*")
    assert "2 KiB" in finding.found


def test_open_files_must_do_for_all_who_come(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {(4096, 4096): "", (resource.RLIM_INFINITY,) * 2: "", (100, 4096): "ulimit -n 176", (100, 100): "raise"}
    for limit, action in limits.items():
        monkeypatch.setattr(resource, "getrlimit", lambda which, limit=limit: limit)
        finding = machine.open_files(ServeConfig())
        assert finding.action.startswith(action)
        assert finding.level == (WARNING if action else OK)


def test_a_taken_port_says_who_has_it() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        (finding,) = ports.ports("127.0.0.1", {"grpc": port, "http": 0})
    assert finding.level == PROBLEM
    assert finding.subject == f"port {port}"
    assert f"gRPC: in use on 127.0.0.1 by {Path('/proc/self/comm').read_text().strip()} (process" in finding.found
    assert finding.action.endswith("--grpc-port")
    assert levels(ports.ports("127.0.0.1", {"grpc": 0, "http": 0})) == {"ports": OK}


@pytest.mark.parametrize(("host", "wanted"), [("no.such.host.invalid", (0, 0)), ("127.0.0.1", (8123, 8123))])
def test_ports_that_cannot_be(host: str, wanted: tuple[int, int]) -> None:
    assert levels(ports.ports(host, dict(zip(("grpc", "http"), wanted, strict=True)))) == {"ports": PROBLEM}


# The settings and their files.


def test_settings_that_cannot_be_read_show_why(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("slot = 3")
    config, finding = settings.read(path)
    assert (config, finding.level) == (None, PROBLEM)
    assert "got unknown key 'slot'" in finding.found
    assert settings.read(SHIPPED)[1].level == OK


def test_weights_are_looked_for_and_their_size_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(choice: dict[str, str] = NO_ENGINE, **values: Any) -> list[Finding]:
        return settings.files(ServeConfig(preset="demo", weights=str(tmp_path), **values), choice, None)

    shutil.copytree(SHIPPED.parent / "demo", tmp_path, dirs_exist_ok=True)
    assert levels(found()) == {"weights": OK}
    assert only(found(decoder="tiny"), "tiny_decoder").found.endswith("taew2_1.pth is not there")
    (tmp_path / DIT_FILE).write_bytes(b"half")
    (tmp_path / VAE_FILE).write_bytes(settings.LFS_POINTER + b"/spec/v1")
    shutil.rmtree(tmp_path / TOKENIZER_FOLDER)
    findings = found()
    assert levels(findings) == {"dit": PROBLEM, "vae_decoder": PROBLEM, "weights": OK, "tokenizer": PROBLEM}
    assert "too small for 1,516,864 parameters" in only(findings, "dit").found
    assert "git lfs pull" in only(findings, "vae_decoder").found
    (tmp_path / QUANTIZED_FILE.format(DIT)).write_bytes(b"x" * 2_000_000)
    assert "dit" not in levels(found())
    assert "is quantized" in only(found(NO_ENGINE | {DIT: "fused"}), "dit").found
    monkeypatch.setitem(sys.modules, "longlive_serve.weights_folder", None)  # it needs PyTorch
    assert levels(found()) == {"weights": NOTE}


def test_weights_that_are_no_folder_and_random_ones() -> None:
    none = settings.files(ServeConfig(preset="demo", weights="/none"), NO_ENGINE, None)
    assert levels(none) == {"weights": PROBLEM}
    assert levels(settings.files(ServeConfig(), NO_ENGINE, None)) == {"weights": NOTE}
    assert levels(settings.files(ServeConfig(preset="demo"), NO_ENGINE, None)) == {"weights": PROBLEM}


def test_graphs_and_plans_must_be_of_what_is_served(tmp_path: Path) -> None:
    choice = NO_ENGINE | {DIT: "tensorrt"}
    config = ServeConfig(dit_engine="tensorrt", plans=str(tmp_path))

    def found(gpu_here: gpu.Gpu | None = None, config: ServeConfig = config) -> Finding:
        return only(settings.files(config, choice, gpu_here), "plans")

    assert (found().level, "has no manifest.json" in found().found) == (PROBLEM, True)
    assert only(settings.files(config, NO_ENGINE, None), "plans").level == NOTE  # nobody wants it
    graph = GraphFile(file="dit.plan", dtype="bfloat16", built={"gpu": "NVIDIA L40S"})
    facts: dict[str, Any] = {"backend": "tensorrt", "variant": "base", "versions": {}}
    manifest = Manifest(sizes=sizes_of(PRESETS["demo"]), graphs={"dit": graph}, **facts)
    manifest.write(tmp_path)
    assert "another LongLive" in found().found
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs={"dit": graph}, **facts).write(tmp_path)
    assert found().found.endswith("has no graph prompt_kv")
    graphs = {"dit": graph, "prompt_kv": graph}
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs=graphs, **facts).write(tmp_path)
    assert found().found.endswith("dit.plan is not there")
    (tmp_path / "dit.plan").write_bytes(b"plan")
    assert found().level == OK
    assert memory.precision(config, choice, "cuda") == "bfloat16"
    assert found(H200).found.endswith("was built for NVIDIA L40S, and here is NVIDIA H200")
    other = ServeConfig(dit_engine="tensorrt", plans=str(tmp_path), dtype="float16")
    assert found(config=other).found.endswith("is in bfloat16, but the settings have dtype float16")


# Memory.


def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MEASURED", tmp_path / "gpu.json")
    found = memory.memory_findings(FULL, NO_ENGINE, "cuda", H200, 64 * GIB)
    assert levels(found) == {"networks": OK, "a session": OK, "by memory": OK, "by compute": NOTE}
    assert "5.06 GiB: KV cache 3.21 GiB, prompt 90 MiB, decoder's cache 1.76 GiB" in only(found, "a session").found
    assert only(found, "by memory").found.endswith("23 sessions fit")
    many = ServeConfig(preset="longlive-1.3b", slots=30)
    assert only(memory.memory_findings(many, NO_ENGINE, "cuda", H200, 64 * GIB), "by memory").action == (
        'slots = 23 or decoder = "tiny"'
    )
    assert levels(memory.memory_findings(FULL, NO_ENGINE, "cuda", H200, 16 * GIB))["loading"] == WARNING  # random ones


def test_what_was_measured_of_compute_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(memory, "MEASURED", path)
    run = {"preset": "longlive-1.3b", "hardware": "NVIDIA H200, 140 GiB, 132 multiprocessors"}
    run |= {"figures_of": {"full_vae": "fused fp8", "tiny_vae": None}}
    path.write_text(json.dumps({memory.SECTION: run, "live_sessions_full_vae": 2, "live_sessions_tiny_vae": None}))
    told = only(memory.memory_findings(FULL, NO_ENGINE, "cuda", H200, 64 * GIB), "by compute")
    assert told.level == OK
    assert told.found.startswith("2 live sessions at 16 fps with fused fp8, measured on NVIDIA H200")
    tiny = ServeConfig(preset="longlive-1.3b", decoder="tiny")
    assert "not measured" in only(memory.memory_findings(tiny, NO_ENGINE, "cuda", H200, 64 * GIB), "by compute").found
    path.write_text(json.dumps({memory.SECTION: run | {"hardware": "NVIDIA L40S"}, "live_sessions_full_vae": 1}))
    other = only(memory.memory_findings(FULL, NO_ENGINE, "cuda", H200, 64 * GIB), "by compute")
    assert (other.level, other.found.endswith("here is NVIDIA H200")) == (NOTE, True)


def test_memory_without_a_gpu_tells_what_gpus_would_hold() -> None:
    found = memory.memory_findings(ServeConfig(), NO_ENGINE, "cpu", None, 8 * GIB)
    assert levels(found)["by memory"] == OK
    assert "H200 23 (37), H100 80 GB 11 (19), L40S 5 (8), RTX 4090 0 (2)" in only(found, "on a GPU").found
    assert levels(memory.memory_findings(FULL, NO_ENGINE, "cpu", None, 8 * GIB))["by memory"] == PROBLEM


# Whole reports.


def doctor(*arguments: str, bare: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command; `bare`: without any installed package but those in this folder."""
    options = ["-S"] if bare else []
    environment = os.environ | ({"PYTHONPATH": f"{bare}:{ROOT}"} if bare else {})
    command_line = [sys.executable, *options, "-m", "longlive_serve.doctor", *arguments]
    return subprocess.run(command_line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def numpy_alone(tmp_path: Path) -> Path:
    """A folder of packages with NumPy and nothing else."""
    folder = Path(np.__file__).parents[1]
    for part in [folder / "numpy", *folder.glob("numpy.libs"), *folder.glob("numpy-*.dist-info")]:
        (tmp_path / part.name).symlink_to(part)
    return tmp_path


def test_with_numpy_alone_it_says_what_is_missing(numpy_alone: Path) -> None:
    done = doctor("--ports", "0,0,0", bare=numpy_alone)
    assert (done.returncode, done.stderr) == (1, "")
    assert "problem  serving         missing: torch, transformers, safetensors, ftfy" in done.stdout
    assert "-> to serve: pip install --editable '.[torch]'" in done.stdout
    assert "problem: cannot serve here: serving: missing: torch" in done.stdout
    assert "5.5 MiB: KV cache 960 KiB" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= command.WIDEST
    assert "\033" not in done.stdout


def test_where_all_is_there_it_says_that_it_can_serve() -> None:
    done = doctor("--ports", "0,0,0", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["can_serve"]
    assert report["summary"].startswith("can serve here: preset demo with torch on the ")
    assert report["memory"]["session"]["kv_slot"] > 0
    titles = [section["title"].split(":")[0] for section in report["sections"]]
    assert titles == ["Software", "Triton Inference Server", "GPU", "Engines", "Machine", "Settings", "Memory"]
    findings = [Finding(**finding) for section in report["sections"] for finding in section["findings"]]
    assert set(levels(findings).values()) <= {OK, NOTE, WARNING}


def test_a_gpu_and_wrong_settings_in_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 143000, 580.95.05, 9.0, GPU-a")
    for module in (software, engines, gpu):
        monkeypatch.setattr(module, "torch_cuda", lambda: "")
    path = tmp_path / "serve.toml"
    path.write_text('preset = "longlive-1.3b"\nslots = 30\nengine = "fused"\n')
    assert command.main(["--config", str(path), "--ports", "0,0,0"]) == 1
    shown = capsys.readouterr().out
    assert "of 140.4 GiB (NVIDIA H200): 23 sessions" in shown  # for when PyTorch is there for CUDA as well
    assert "engine fused: is asked for, but cannot run: PyTorch is built without CUDA" in shown
    path.write_text("slots = 0")
    assert command.main(["--config", str(path), "--ports", "0,0,0", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["memory"] is None
    assert "slots: got 0" in report["summary"]


def test_ports_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--ports", "8001"])
    assert "--ports: got 8001, expected 3 numbers" in capsys.readouterr().err
