# SPDX-License-Identifier: Apache-2.0
"""The doctor: what it finds well and not well, on machines that are faked, and whole reports of this one."""

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
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult, Section, lines_of, size
from longlive_serve.doctor.memory_model import GIB
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.weights.loader import DIT_FILE, QUANTIZED_FILE, TOKENIZER_FOLDER, VAE_FILE
from tests.longlive_serve.doctor.test_doctor_machine import FULL, fake_nvidia_smi, levels, only

FREE = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "model_repository/longlive/1/serve.toml"
H200 = gpu.Gpu(name="NVIDIA H200", memory=143771 << 20, free=143000 << 20, driver="580.95.05", capability=(9, 0))
NO_BACKEND = dict.fromkeys((TEXT_ENCODER, DIT, VAE_DECODER), "torch")


# The report as text.


def test_lines_are_aligned_and_no_wider_than_asked_and_coloured_only_when_asked() -> None:
    results = [CheckResult(OK, "short", "well"), CheckResult(PROBLEM, "a longer one", "bad " * 30, "do this " * 12)]
    lines = list(lines_of([Section("Title", results)], 60, colours=False))
    assert max(map(len, lines)) <= 60
    assert lines[:2] == ["Title", "  ok       short         well"]
    assert all(line.startswith(" " * 25) for line in lines[3:-1])
    coloured = list(lines_of([Section("Title", results)], 60, colours=True))
    assert "\033[1;31mproblem\033[0m" in coloured[2]
    assert [line.replace("\033[32mok\033[0m", "ok") for line in coloured][1] == lines[1]


def test_bytes_are_in_words() -> None:
    assert [size(n) for n in (12, 2**20, 1.76 * GIB, 140.4 * GIB)] == ["12 B", "1 MiB", "1.76 GiB", "140.4 GiB"]


# Software.


def test_missing_packages_name_the_extra_that_brings_them(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.13.0+cpu", "transformers": "5.0.0", "safetensors": "0.8.0", "ftfy": "6.3.1"}
    monkeypatch.setattr(software, "version_of", lambda package: versions.get(package, ""))
    results = software.software()
    assert levels(results) == {
        "Python": OK, "longlive-serve": OK, "serving": NOTE, "client": NOTE, "encoding": NOTE, "ONNX Runtime": NOTE,
        "export": NOTE, "quantization": NOTE, "plots": NOTE,
    }  # fmt: skip
    assert "transformers 5.0.0 (tested with" in only(results, "serving").found
    assert "pip install --editable '.[client]'" in only(results, "client").action
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
    results = software.triton_server()
    assert only(results, "server").found == f"{binary.resolve()}, version 2.61.0"
    return only(results, "Python backend")


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
        raise ServerStartError("no Triton server: looked everywhere; pip install 'longlive-serve[triton]'")

    monkeypatch.setattr(software, "find_install", none)
    (result,) = software.triton_server()
    assert result.level == PROBLEM
    assert result.found == "no Triton server: looked everywhere"
    assert result.action == "pip install --editable '.[triton]'"


# Backends.


def test_engines_need_their_libraries_and_their_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = levels(backends.backend_results(backends.here("cpu", None), "cpu"))
    assert on_cpu == {"torch": OK, "fused": NOTE, "onnxruntime": OK, "tensorrt": NOTE}
    assert levels(backends.backend_results(backends.here("cuda", None), "cuda"))["torch"] == NOTE
    monkeypatch.setattr(backends, "torch_cuda", lambda: "13.0")
    on_gpu = levels(backends.backend_results(backends.here("cuda", H200), "cuda"))
    assert on_gpu == {"torch": OK, "fused": OK, "onnxruntime": NOTE, "tensorrt": OK}  # it is ONNX Runtime for CPUs
    monkeypatch.setattr(backends, "version_of", lambda package: "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "torch" or None)
    bare = levels(backends.backend_results(backends.here("cuda", H200), "cuda"))
    assert bare == {"torch": OK, "fused": NOTE, "onnxruntime": NOTE, "tensorrt": NOTE}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert levels(backends.backend_results(backends.here("cpu", None), "cpu")) == {"backends": NOTE}


def test_what_the_settings_come_to_and_whether_it_can_run() -> None:
    def found(device: str, used: gpu.Gpu | None, **values: Any) -> dict[str, str]:
        config = ServeConfig(**values)
        return levels(
            backends.chosen_results(config, backends.chosen(config), backends.here(device, used), device, used)
        )

    assert found("cpu", None) == {"backends": OK}
    assert found("cpu", None, backend="fused") == {"backends": OK, "backend fused": PROBLEM}
    assert found("cpu", None, preset="longlive-1.3b") == {"backends": OK, "speed": WARNING}
    old = gpu.Gpu(name="A100", memory=1, free=1, driver="", capability=(8, 0))
    assert found("cpu", old, backend="fused", fp8=True, dtype="float16")["fp8"] == PROBLEM
    fp8 = {"backend": "fused", "fp8": True, "fp8_attention": True}
    assert found("cuda", H200, **fp8)["cuDNN frontend"] == NOTE
    assert found("cuda", H200, **fp8, fp8_decoder=True)["cuDNN frontend"] == PROBLEM
    assert found("cpu", None, graphs="/none") == {}  # the folder is told of elsewhere


# The settings and their files.


def test_settings_that_cannot_be_read_show_why(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text("slot = 3")
    config, result = settings.read(path)
    assert (config, result.level) == (None, PROBLEM)
    assert "got unknown key 'slot'" in result.found
    assert settings.read(SHIPPED)[1].level == OK


def test_weights_are_looked_for_and_their_size_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(choice: dict[str, str] = NO_BACKEND, **values: Any) -> list[CheckResult]:
        return settings.files(ServeConfig(preset="demo", weights=str(tmp_path), **values), choice, None)

    shutil.copytree(SHIPPED.parent / "demo", tmp_path, dirs_exist_ok=True)
    assert levels(found()) == {"weights": OK}
    assert only(found(decoder="tiny"), "tiny_decoder").found.endswith("taew2_1.pth is not there")
    (tmp_path / DIT_FILE).write_bytes(b"half")
    (tmp_path / VAE_FILE).write_bytes(settings.LFS_POINTER + b"/spec/v1")
    shutil.rmtree(tmp_path / TOKENIZER_FOLDER)
    results = found()
    assert levels(results) == {"dit": PROBLEM, "vae_decoder": PROBLEM, "weights": OK, "tokenizer": PROBLEM}
    assert "too small for 1,516,864 parameters" in only(results, "dit").found
    assert "git lfs pull" in only(results, "vae_decoder").found
    (tmp_path / QUANTIZED_FILE.format(DIT)).write_bytes(b"x" * 2_000_000)
    assert "dit" not in levels(found())
    assert "is quantized" in only(found(NO_BACKEND | {DIT: "fused"}), "dit").found
    monkeypatch.setitem(sys.modules, "longlive_serve.weights.layouts", None)  # it needs PyTorch
    assert levels(found()) == {"weights": NOTE}


def test_weights_that_are_no_folder_and_random_ones() -> None:
    none = settings.files(ServeConfig(preset="demo", weights="/none"), NO_BACKEND, None)
    assert levels(none) == {"weights": PROBLEM}
    assert levels(settings.files(ServeConfig(), NO_BACKEND, None)) == {"weights": NOTE}
    assert levels(settings.files(ServeConfig(preset="demo"), NO_BACKEND, None)) == {"weights": PROBLEM}


def test_graphs_and_engines_must_be_of_what_is_served(tmp_path: Path) -> None:
    choice = NO_BACKEND | {DIT: "tensorrt"}
    config = ServeConfig(dit_backend="tensorrt", tensorrt_engines=str(tmp_path))

    def found(gpu_here: gpu.Gpu | None = None, config: ServeConfig = config) -> CheckResult:
        return only(settings.files(config, choice, gpu_here), "tensorrt_engines")

    assert (found().level, "has no manifest.json" in found().found) == (PROBLEM, True)
    assert only(settings.files(config, NO_BACKEND, None), "tensorrt_engines").level == NOTE  # nobody wants it
    graph = GraphFile(file="dit.engine", dtype="bfloat16", built={"gpu": "NVIDIA L40S"})
    facts: dict[str, Any] = {"backend": "tensorrt", "variant": "base", "versions": {}}
    manifest = Manifest(sizes=sizes_of(PRESETS["demo"]), graphs={"dit": graph}, **facts)
    manifest.write(tmp_path)
    assert "another LongLive" in found().found
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs={"dit": graph}, **facts).write(tmp_path)
    assert found().found.endswith("has no graph prompt_kv")
    graphs = {"dit": graph, "prompt_kv": graph}
    Manifest(sizes=sizes_of(PRESETS["tiny"]), graphs=graphs, **facts).write(tmp_path)
    assert found().found.endswith("dit.engine is not there")
    (tmp_path / "dit.engine").write_bytes(b"engine")
    assert found().level == OK
    assert memory.precision(config, choice, "cuda") == "bfloat16"
    assert found(H200).found.endswith("was built for NVIDIA L40S, and here is NVIDIA H200")
    other = ServeConfig(dit_backend="tensorrt", tensorrt_engines=str(tmp_path), dtype="float16")
    assert found(config=other).found.endswith("is in bfloat16, but the settings have dtype float16")


# Memory.


def test_memory_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "MEASURED", tmp_path / "gpu.json")
    found = memory.memory_results(FULL, NO_BACKEND, "cuda", H200, 64 * GIB)
    assert levels(found) == {"models": OK, "a session": OK, "by memory": OK, "by compute": NOTE}
    assert "5.06 GiB: KV cache 3.21 GiB, prompt 90 MiB, decoder's cache 1.76 GiB" in only(found, "a session").found
    assert only(found, "by memory").found.endswith("23 sessions fit")
    many = ServeConfig(preset="longlive-1.3b", slots=30)
    assert only(memory.memory_results(many, NO_BACKEND, "cuda", H200, 64 * GIB), "by memory").action == (
        'slots = 23 or decoder = "tiny"'
    )
    assert levels(memory.memory_results(FULL, NO_BACKEND, "cuda", H200, 16 * GIB))["loading"] == WARNING  # random ones


def test_what_was_measured_of_compute_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(memory, "MEASURED", path)
    run: dict[str, Any] = {"preset": "longlive-1.3b", "hardware": "NVIDIA H200, 140 GiB, 132 multiprocessors"}
    run |= {"figures_of": {"full_vae": "fused fp8", "tiny_vae": None}}
    path.write_text(json.dumps({memory.SECTION: run, "live_sessions_full_vae": 2, "live_sessions_tiny_vae": None}))
    told = only(memory.memory_results(FULL, NO_BACKEND, "cuda", H200, 64 * GIB), "by compute")
    assert told.level == OK
    assert told.found.startswith("2 live sessions at 16 fps with fused fp8, measured on NVIDIA H200")
    tiny = ServeConfig(preset="longlive-1.3b", decoder="tiny")
    assert "not measured" in only(memory.memory_results(tiny, NO_BACKEND, "cuda", H200, 64 * GIB), "by compute").found
    path.write_text(json.dumps({memory.SECTION: run | {"hardware": "NVIDIA L40S"}, "live_sessions_full_vae": 1}))
    other = only(memory.memory_results(FULL, NO_BACKEND, "cuda", H200, 64 * GIB), "by compute")
    assert (other.level, other.found.endswith("here is NVIDIA H200")) == (NOTE, True)


def test_memory_without_a_gpu_tells_what_gpus_would_hold() -> None:
    found = memory.memory_results(ServeConfig(), NO_BACKEND, "cpu", None, 8 * GIB)
    assert levels(found)["by memory"] == OK
    assert "H200 23 (37), H100 80 GB 11 (19), L40S 5 (8), RTX 4090 0 (2)" in only(found, "on a GPU").found
    assert levels(memory.memory_results(FULL, NO_BACKEND, "cpu", None, 8 * GIB))["by memory"] == PROBLEM


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
    assert "problem  serving         missing: torch, transformers, safetensors, ftfy" in done.stdout
    assert "-> to serve: pip install --editable '.[torch]'" in done.stdout
    assert "problem: cannot serve here: serving: missing: torch" in done.stdout
    assert "5.5 MiB: KV cache 960 KiB" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= command.WIDEST
    assert "\033" not in done.stdout


def test_where_all_is_there_it_says_that_it_can_serve() -> None:
    done = doctor(*FREE, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["can_serve"]
    assert report["summary"].startswith("can serve here: preset demo with torch on the ")
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
    assert "of 140.4 GiB (NVIDIA H200): 23 sessions" in shown  # for when PyTorch is there for CUDA as well
    assert "backend fused: is asked for, but cannot run: PyTorch is built without CUDA" in shown
    path.write_text("slots = 0")
    assert command.main(["--config", str(path), *FREE, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["memory"] is None
    assert "slots: got 0" in report["summary"]


def test_ports_that_are_no_numbers_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--tls-cert", "cert.pem"])
    assert "tls: got some of cert, key and client_ca" in capsys.readouterr().err
