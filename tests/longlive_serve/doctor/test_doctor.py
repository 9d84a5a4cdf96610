# SPDX-License-Identifier: Apache-2.0
"""The doctor: its checks on fake machines, and whole reports of this one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlive_serve.backends.exported.manifest import GraphFile, Manifest, sizes_of
from longlive_serve.config.presets import DIT, PRESETS, TEXT_ENCODER, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.doctor import __main__ as command
from longlive_serve.doctor import backends, gpu, memory, settings, software
from longlive_serve.doctor.check_result import (
    ERROR,
    NOTE,
    OK,
    WARNING,
    CheckResult,
    Section,
    format_bytes,
    format_sections,
)
from longlive_serve.doctor.memory_model import GIB
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.weights.layouts import DIT_FILE, QUANTIZED_FILE, TOKENIZER_FOLDER, VAE_FILE
from tests.longlive_serve.doctor.test_doctor_machine import FULL, fake_nvidia_smi, levels, only

FREE = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "model_repository/longlive/1/serve.toml"
H200 = gpu.Gpu(name="NVIDIA H200", memory=143771 << 20, free=143000 << 20, driver="580.95.05", capability=(9, 0))
NO_BACKEND = dict.fromkeys((TEXT_ENCODER, DIT, VAE_DECODER), "torch")


# The report as text.


def test_lines_are_aligned_and_at_most_as_wide_as_asked() -> None:
    results = [CheckResult(OK, "short", "well"), CheckResult(ERROR, "a longer one", "bad " * 30, "do this " * 12)]
    lines = list(format_sections([Section("Title", results)], 60))
    assert max(map(len, lines)) <= 60
    assert lines[:2] == ["Title", "  ok       short         well"]
    assert all(line.startswith(" " * 25) for line in lines[3:-1])


def test_bytes_are_in_words() -> None:
    assert [format_bytes(n) for n in (12, 2**20, 1.76 * GIB, 140.4 * GIB)] == ["12 B", "1 MiB", "1.76 GiB", "140.4 GiB"]


# Software.


def test_missing_packages_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "5.0.0", "safetensors": "0.8.0", "ftfy": "6.3.1"}
    monkeypatch.setattr(software, "version_of", lambda package: versions.get(package, ""))
    results = software.check_software()
    assert levels(results) == {
        "Python": OK, "longlive-serve": OK, "serving": NOTE, "client": NOTE, "encoding": NOTE, "ONNX Runtime": NOTE,
        "export": NOTE, "quantization": NOTE, "plots": NOTE,
    }  # fmt: skip
    assert "transformers 5.0.0 (tested with" in only(results, "serving").message
    assert "pip install --editable '.[client]'" in only(results, "client").action
    del versions["torch"]
    missing = only(software.check_software(), "serving")
    assert (missing.level, missing.message) == (ERROR, "missing: torch")


def test_extras_are_the_same_from_the_checkout_and_as_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkout = software.pinned_versions()
    assert checkout["client"].keys() == {"tritonclient", "av", "rich"}
    monkeypatch.setattr(software, "PYPROJECT", tmp_path / "none")
    lines = [
        f'{name}=={version}; extra == "{extra}"' for extra, pins in checkout.items() for name, version in pins.items()
    ]
    monkeypatch.setattr("importlib.metadata.requires", lambda project: ["numpy>=1.26", *lines])
    assert software.pinned_versions() == checkout
    assert software.pip_install("torch") == "pip install 'longlive-serve[torch]'"


def triton_with(folder: Path, monkeypatch: pytest.MonkeyPatch, stub: bytes | None) -> CheckResult:
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
    results = software.check_triton()
    assert only(results, "server").message == f"{binary.resolve()}, version 2.61.0"
    return only(results, "Python backend")


def test_the_backend_must_run_this_version_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"libpython3.{sys.version_info.minor}.so.1.0".encode()
    assert triton_with(tmp_path, monkeypatch, None).level == ERROR
    assert triton_with(tmp_path, monkeypatch, b"ELF " + own).level == OK
    assert triton_with(tmp_path, monkeypatch, b"ELF").level == WARNING
    other = triton_with(tmp_path, monkeypatch, b"ELF libpython3.9.so.1.0")
    assert (other.level, other.action) == (ERROR, "run this with Python 3.9, with the packages installed there")


def test_without_a_server_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert levels(software.check_triton()) == {"server": OK, "Python backend": OK}  # the wheel's

    def none(scratch: Path) -> None:
        raise ServerStartError("no Triton server: looked everywhere; pip install 'longlive-serve[triton]'")

    monkeypatch.setattr(software, "find_install", none)
    (result,) = software.check_triton()
    assert result.level == ERROR
    assert result.message == "no Triton server: looked everywhere"
    assert result.action == "pip install --editable '.[triton]'"


# Backends.


def test_backends_need_their_libraries_and_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = levels(backends.check_backends(backends.find_backends("cpu", None), "cpu"))
    assert on_cpu == {"torch": OK, "fused": NOTE, "onnxruntime": OK, "tensorrt": NOTE}
    assert levels(backends.check_backends(backends.find_backends("cuda", None), "cuda"))["torch"] == NOTE
    monkeypatch.setattr(backends, "torch_cuda", lambda: "13.0")
    on_gpu = levels(backends.check_backends(backends.find_backends("cuda", H200), "cuda"))
    assert on_gpu == {"torch": OK, "fused": OK, "onnxruntime": NOTE, "tensorrt": OK}  # it is ONNX Runtime for CPUs
    monkeypatch.setattr(backends, "version_of", lambda package: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torch" or None)
    bare = levels(backends.check_backends(backends.find_backends("cuda", H200), "cuda"))
    assert bare == {"torch": OK, "fused": NOTE, "onnxruntime": NOTE, "tensorrt": NOTE}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    none = levels(backends.check_backends(backends.find_backends("cpu", None), "cpu"))
    assert none == dict.fromkeys(bare, NOTE)


def test_what_the_settings_come_to_and_whether_it_can_run() -> None:
    def found(device: str, used: gpu.Gpu | None, **values: Any) -> dict[str, str]:
        config = ServeConfig(**values)
        return levels(
            backends.check_selection(
                config, backends.select_backends(config), backends.find_backends(device, used), device, used
            )
        )

    assert found("cpu", None) == {"backends": OK}
    assert found("cpu", None, backend="fused") == {"backends": OK, "backend fused": ERROR}
    assert found("cpu", None, preset="longlive-1.3b") == {"backends": OK, "device": WARNING}
    old = gpu.Gpu(name="A100", memory=1, free=1, driver="", capability=(8, 0))
    assert found("cpu", old, backend="fused", fp8=True, dtype="float16")["fp8"] == ERROR
    fp8 = {"backend": "fused", "fp8": True, "fp8_attention": True}
    assert found("cuda", H200, **fp8)["cuDNN frontend"] == NOTE
    assert found("cuda", H200, **fp8, fp8_decoder=True)["cuDNN frontend"] == ERROR
    assert found("cpu", None, graphs="/none") == {}  # the folder is told of elsewhere


# The settings and their files.


def test_settings_that_cannot_be_read_show_why(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("slot = 3")
    config, result = settings.read_settings(path)
    assert (config, result.level) == (None, ERROR)
    assert "got unknown key 'slot'" in result.message
    assert settings.read_settings(SHIPPED)[1].level == OK


def test_weights_are_looked_for_and_their_size_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(choice: dict[str, str] = NO_BACKEND, **values: Any) -> list[CheckResult]:
        return settings.check_files(ServeConfig(preset="demo", weights=str(tmp_path), **values), choice, None)

    shutil.copytree(SHIPPED.parent / "demo", tmp_path, dirs_exist_ok=True)
    assert levels(found()) == {"weights": OK}
    assert only(found(decoder="tiny"), "tiny_decoder").message.endswith("taew2_1.pth not found")
    (tmp_path / DIT_FILE).write_bytes(b"half")
    (tmp_path / VAE_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    shutil.rmtree(tmp_path / TOKENIZER_FOLDER)
    results = found()
    assert levels(results) == {"dit": ERROR, "vae_decoder": ERROR, "weights": OK, "tokenizer": ERROR}
    assert "got 4 B, expected 1,516,864 parameters" in only(results, "dit").message
    assert "git lfs pull" in only(results, "vae_decoder").message
    (tmp_path / QUANTIZED_FILE.format(DIT)).write_bytes(b"x" * 2_000_000)
    assert "dit" not in levels(found())
    assert "is quantized" in only(found(NO_BACKEND | {DIT: "fused"}), "dit").message
    monkeypatch.setitem(sys.modules, "longlive_serve.weights.layouts", None)  # it needs PyTorch
    assert levels(found()) == {"weights": NOTE}


def test_weights_that_are_no_folder_and_random_ones() -> None:
    none = settings.check_files(ServeConfig(preset="demo", weights="/none"), NO_BACKEND, None)
    assert levels(none) == {"weights": ERROR}
    assert levels(settings.check_files(ServeConfig(), NO_BACKEND, None)) == {"weights": NOTE}
    assert levels(settings.check_files(ServeConfig(preset="demo"), NO_BACKEND, None)) == {"weights": ERROR}


def test_graphs_and_engines_must_be_of_what_is_served(tmp_path: Path) -> None:
    choice = NO_BACKEND | {DIT: "tensorrt"}
    config = ServeConfig(dit_backend="tensorrt", tensorrt_engines=str(tmp_path))

    def found(gpu_here: gpu.Gpu | None = None, config: ServeConfig = config) -> CheckResult:
        return only(settings.check_files(config, choice, gpu_here), "tensorrt_engines")

    assert (found().level, "not a manifest of graphs" in found().message) == (ERROR, True)
    assert only(settings.check_files(config, NO_BACKEND, None), "tensorrt_engines").level == NOTE  # nobody wants it
    graph = GraphFile(file="dit.engine", dtype="bfloat16", built={"gpu": "NVIDIA L40S"})
    facts: dict[str, Any] = {"backend": "tensorrt", "variant": "base", "versions": {}}
    manifest = Manifest(sizes=sizes_of(PRESETS["demo"]), graphs={"dit": graph}, **facts)
    manifest.write(tmp_path)
    assert "another LongLive" in found().message
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs={"dit": graph}, **facts).write(tmp_path)
    assert found().message.endswith("has no graph prompt_kv")
    graphs = {"dit": graph, "prompt_kv": graph}
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs=graphs, **facts).write(tmp_path)
    assert found().message.endswith("dit.engine not found")
    (tmp_path / "dit.engine").write_bytes(b"engine")
    assert found().level == OK
    assert memory.dit_dtype(config, choice, "cuda") == "bfloat16"
    assert found(H200).message.endswith("was built for NVIDIA L40S, but the GPU is NVIDIA H200")
    other = ServeConfig(dit_backend="tensorrt", tensorrt_engines=str(tmp_path), dtype="float16")
    assert found(config=other).message.endswith("is in bfloat16, but the settings have dtype float16")


# Memory.


def test_memory_on_a_gpu() -> None:
    found = memory.check_memory(FULL, NO_BACKEND, "cuda", H200, 64 * GIB)
    assert levels(found) == {"models": OK, "session": OK, "slots": OK, "speed": NOTE}
    assert "5.06 GiB: KV cache 3.21 GiB, prompt 90 MiB, decoder's cache 1.76 GiB" in only(found, "session").message
    assert only(found, "slots").message.endswith("at most 23 sessions fit")
    many = ServeConfig(preset="longlive-1.3b", slots=30)
    assert only(memory.check_memory(many, NO_BACKEND, "cuda", H200, 64 * GIB), "slots").action == (
        'slots = 23 or decoder = "tiny"'
    )


def test_memory_without_a_gpu_tells_what_gpus_would_hold() -> None:
    found = memory.check_memory(ServeConfig(), NO_BACKEND, "cpu", None, 8 * GIB)
    assert levels(found)["slots"] == OK
    assert "H200 23 (37), H100 80 GB 11 (19), L40S 5 (8), RTX 4090 0 (2)" in only(found, "other GPUs").message
    assert levels(memory.check_memory(FULL, NO_BACKEND, "cpu", None, 8 * GIB))["slots"] == ERROR


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
    done = doctor(*FREE, bare=numpy_alone)
    assert (done.returncode, done.stderr) == (1, "")
    assert "error    serving         missing: torch, transformers, safetensors, ftfy" in done.stdout
    assert "-> to serve: pip install --editable '.[torch]'" in done.stdout
    assert "error: cannot serve here: serving: missing: torch" in done.stdout
    assert "5.5 MiB: KV cache 960 KiB" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= command.MAX_WIDTH


def test_where_all_is_there_it_says_that_it_can_serve() -> None:
    done = doctor(*FREE, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["can_serve"]
    assert report["summary"].startswith("can serve here: preset demo with torch on ")
    assert report["memory"]["session"]["kv_slot"] > 0
    titles = [section["title"].split(":")[0] for section in report["sections"]]
    assert titles == ["Software", "Triton Inference Server", "GPU", "Backends", "Machine", "Settings", "Memory"]
    results = [CheckResult(**result) for section in report["sections"] for result in section["results"]]
    assert set(levels(results).values()) <= {OK, NOTE, WARNING}


def test_a_gpu_and_wrong_settings_in_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_nvidia_smi(tmp_path, monkeypatch, "NVIDIA H200, 143771, 143000, 580.95.05, 9.0, GPU-a")
    for module in (software, backends, gpu):
        monkeypatch.setattr(module, "torch_cuda", lambda: "")
    path = tmp_path / "serve.toml"
    path.write_text('preset = "longlive-1.3b"\nslots = 30\nbackend = "fused"\n')
    assert command.main(["--config", str(path), *FREE]) == 1
    shown = capsys.readouterr().out
    assert "of 140.4 GiB (NVIDIA H200)" in shown  # for when PyTorch is there for CUDA as well
    assert "backend fused: selected, but cannot run: PyTorch is built without CUDA" in shown
    path.write_text("slots = 0")
    assert command.main(["--config", str(path), *FREE, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["memory"] is None
    assert "slots: got 0" in report["summary"]


def test_some_of_the_tls_files_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--tls-cert", "cert.pem"])
    assert "tls: got some of cert, key and client_ca" in capsys.readouterr().err
