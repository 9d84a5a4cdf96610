# SPDX-License-Identifier: Apache-2.0
"""Which backends this machine can run, and which the settings come to. Nothing is loaded.

Called by the command line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

from longlive_serve.backends.registry import choose
from longlive_serve.config.presets import MODELS
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult
from longlive_serve.doctor.gpu import Gpu
from longlive_serve.doctor.memory_model import dit_parameters
from longlive_serve.doctor.software import pip_install, torch_cuda, version_of

TENSORRT_PACKAGES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt_rtx", "tensorrt_rtx_cu13_bindings")

LARGE = 100_000_000  # parameters of a DiT that no CPU runs in real time


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why a backend cannot run here, and what to do."""

    why: str
    action: str


ELSEWHERE = "another backend here, or this one on a machine with a GPU"
TORCHLESS = Reason("PyTorch is not installed, and every backend needs it", pip_install("torch"))
CUDALESS = Reason("PyTorch is built without CUDA", "install it for CUDA: https://pytorch.org/get-started/locally")


def here(device: str, gpu: Gpu | None) -> dict[str, Reason | str]:
    """Every backend with the version of what runs it, or with the reason why it cannot. `device`: cpu or cuda."""
    if not has_torch():
        return dict.fromkeys((TORCH, FUSED, ONNXRUNTIME, TENSORRT), TORCHLESS)
    return {
        TORCH: _torch(device, gpu),
        FUSED: _fused(gpu),
        ONNXRUNTIME: _onnxruntime(device),
        TENSORRT: _tensorrt(gpu),
    }


def has_torch() -> bool:
    return importlib.util.find_spec("torch") is not None


def _torch(device: str, gpu: Gpu | None) -> Reason | str:
    if device != "cpu" and gpu is None:
        return Reason("there is no GPU to be used", 'device = "auto" or "cpu" in the settings')
    if device != "cpu" and not torch_cuda():
        return CUDALESS
    built_for = torch_cuda()
    return f"PyTorch {version_of('torch')}, built {f'for CUDA {built_for}' if built_for else 'without CUDA'}"


def _fused(gpu: Gpu | None) -> Reason | str:
    if gpu is None:
        return Reason("its kernels need an NVIDIA GPU", ELSEWHERE)
    if not torch_cuda():
        return CUDALESS
    if importlib.util.find_spec("triton") is None:
        return Reason("it needs the compiler Triton, which PyTorch for CUDA brings", "pip install triton")
    return f"Triton {version_of('triton') or '(unknown)'} (the compiler)"


def _onnxruntime(device: str) -> Reason | str:
    if importlib.util.find_spec("onnxruntime") is None:
        return Reason("ONNX Runtime is not installed", pip_install("onnxruntime"))
    on_gpu = version_of("onnxruntime-gpu")
    if device != "cpu" and not on_gpu:
        return Reason("this ONNX Runtime has nothing for the GPU", "pip install onnxruntime-gpu in its place")
    return f"ONNX Runtime {on_gpu or version_of('onnxruntime')}"


def _tensorrt(gpu: Gpu | None) -> Reason | str:
    found = [f"{package} {version}" for package in TENSORRT_PACKAGES if (version := version_of(package))]
    if not found:
        return Reason("TensorRT is not installed", "NVIDIA's container, or pip install tensorrt-cu13")
    if gpu is None:
        return Reason(f"{found[0]} is here, but it needs an NVIDIA GPU", ELSEWHERE)
    return found[0] if torch_cuda() else CUDALESS


def backend_results(backends: Mapping[str, Reason | str], device: str) -> list[CheckResult]:
    if not has_torch():
        return [CheckResult(NOTE, "backends", f"none can run: {TORCHLESS.why}", TORCHLESS.action)]
    where = "the CPU" if device == "cpu" else "the GPU"
    return [
        CheckResult(NOTE, backend, f"cannot run: {found.why}", found.action)
        if isinstance(found, Reason)
        else CheckResult(OK, backend, f"can run on {where}: {found}")
        for backend, found in backends.items()
    ]


def chosen(config: ServeConfig) -> dict[str, str]:
    """The backend of every model; empty where that cannot be told, without PyTorch or for a folder that is none of
    graphs or engines."""
    try:
        return {model: choose(model, config) for model in MODELS}
    except (ImportError, ValueError):
        return {}


def chosen_results(
    config: ServeConfig, choice: Mapping[str, str], backends: Mapping[str, Reason | str], device: str, gpu: Gpu | None
) -> list[CheckResult]:
    """What the settings come to for every model, and whether that can run."""
    if not choice and has_torch():
        return []  # what is wrong with the folder is told where files are looked for
    if not choice:
        text = "`auto` cannot be told without PyTorch where graphs or engines are named"
        return [CheckResult(WARNING, "backends", text, pip_install("torch"))]
    names = [f"{model} {backend}" for model, backend in choice.items()]
    where = "the CPU" if device == "cpu" else "the GPU"
    asked = {getattr(config, f"{model}_backend") or config.backend for model in MODELS}
    results = [CheckResult(OK, "backends", f"{', '.join(names)}{' (auto)' if asked == {AUTO} else ''}, on {where}")]
    for backend in dict.fromkeys(choice.values()):
        reason = backends[backend]
        if isinstance(reason, Reason) and reason is not TORCHLESS:  # which is said under Software
            text = f"is asked for, but cannot run: {reason.why}"
            results.append(CheckResult(PROBLEM, f"backend {backend}", text, reason.action))
    if config.fp8 and gpu is not None and not gpu.has_fp8:
        results.append(CheckResult(PROBLEM, "fp8", f"is asked for, but {gpu.name} has none", "fp8 = false"))
    if (config.fp8_decoder or config.fp8_attention) and importlib.util.find_spec("cudnn") is None:
        needed = config.fp8_decoder
        text = "missing, and fp8_decoder takes it" if needed else "missing: attention in FP8 is by our own kernel"
        results.append(CheckResult(PROBLEM if needed else NOTE, "cuDNN frontend", text, pip_install("cudnn")))
    if config.fp8 and config.dtype not in (AUTO, "bfloat16"):
        text = f"is asked for, with dtype {config.dtype}, but it takes bfloat16"
        results.append(CheckResult(PROBLEM, "fp8", text, 'dtype = "auto"'))
    return [*results, *_speed(config, choice, backends, device)]


def _speed(
    config: ServeConfig, choice: Mapping[str, str], backends: Mapping[str, Reason | str], device: str
) -> list[CheckResult]:
    if device == "cpu" and dit_parameters(config.model_config.dit) > LARGE:
        text = f"preset {config.preset} on the CPU takes minutes for every chunk, which plays 0.75 s"
        return [CheckResult(WARNING, "speed", text, 'serve it on a GPU; preset = "demo" is in real time on a CPU')]
    if not isinstance(backends[FUSED], Reason) and not {FUSED, TENSORRT} & set(choice.values()):
        text = f"the backend {FUSED} can run here and is not asked for"
        return [CheckResult(NOTE, "speed", text, f'backend = "{FUSED}" in the settings')]
    return []
