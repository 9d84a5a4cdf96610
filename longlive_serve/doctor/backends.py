# SPDX-License-Identifier: Apache-2.0
"""Which backends can run on this machine, and which ones the settings select. No model is loaded.

Called by the command line.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping

from longlive_serve.backends.registry import choose_backends
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import ERROR, NOTE, OK, WARNING, CheckResult
from longlive_serve.doctor.gpu import INSTALL_CUDA_TORCH, Gpu
from longlive_serve.doctor.memory_model import dit_parameters
from longlive_serve.doctor.software import pip_install, torch_cuda, version_of

TENSORRT_PACKAGES = ("tensorrt", "tensorrt_cu13", "tensorrt_cu12", "tensorrt_rtx", "tensorrt_rtx_cu13_bindings")
MAX_CPU_PARAMETERS = 100_000_000  # of a DiT; larger ones are far from real time on any CPU


@dataclasses.dataclass(frozen=True)
class Unavailable:
    """Why a backend cannot run here, and what to do."""

    reason: str
    action: str


OTHER_MACHINE = "use another backend, or a machine with an NVIDIA GPU"
NO_TORCH = Unavailable("PyTorch is not installed", pip_install("torch"))
NO_CUDA = Unavailable("PyTorch is built without CUDA", INSTALL_CUDA_TORCH)


def find_backends(device: str, gpu: Gpu | None) -> dict[str, str | Unavailable]:
    """By backend: the version of its library, or why it cannot run. `device`: cpu or cuda."""
    if not _is_installed("torch"):
        return dict.fromkeys((TORCH, FUSED, ONNXRUNTIME, TENSORRT), NO_TORCH)
    return {
        TORCH: _find_torch(device, gpu),
        FUSED: _find_fused(gpu),
        ONNXRUNTIME: _find_onnxruntime(device),
        TENSORRT: _find_tensorrt(gpu),
    }


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _find_torch(device: str, gpu: Gpu | None) -> str | Unavailable:
    if device != "cpu" and gpu is None:
        return Unavailable("there is no such GPU", 'device = "auto" or "cpu" in the settings')
    if device != "cpu" and not torch_cuda():
        return NO_CUDA
    return f"PyTorch {version_of('torch')}, CUDA {torch_cuda() or 'none'}"


def _find_fused(gpu: Gpu | None) -> str | Unavailable:
    if gpu is None:
        return Unavailable("its kernels need an NVIDIA GPU", OTHER_MACHINE)
    if not torch_cuda():
        return NO_CUDA
    if not _is_installed("triton"):
        return Unavailable("the compiler Triton is not installed; PyTorch for CUDA brings it", "pip install triton")
    return f"Triton {version_of('triton')} (the compiler)"


def _find_onnxruntime(device: str) -> str | Unavailable:
    if not _is_installed("onnxruntime"):
        return Unavailable("ONNX Runtime is not installed", pip_install("onnxruntime"))
    gpu_version = version_of("onnxruntime-gpu")
    if device != "cpu" and not gpu_version:
        return Unavailable("this ONNX Runtime supports CPUs only", "pip install onnxruntime-gpu instead")
    return f"ONNX Runtime {gpu_version or version_of('onnxruntime')}"


def _find_tensorrt(gpu: Gpu | None) -> str | Unavailable:
    versions = [f"{package} {version}" for package in TENSORRT_PACKAGES if (version := version_of(package))]
    if not versions:
        return Unavailable("TensorRT is not installed", "use NVIDIA's container, or pip install tensorrt-cu13")
    if gpu is None:
        return Unavailable(f"{versions[0]} needs an NVIDIA GPU", OTHER_MACHINE)
    return versions[0] if torch_cuda() else NO_CUDA


def check_backends(available: Mapping[str, str | Unavailable], device: str) -> list[CheckResult]:
    return [
        CheckResult(NOTE, backend, f"cannot run: {version.reason}", version.action)
        if isinstance(version, Unavailable)
        else CheckResult(OK, backend, f"can run on {device}: {version}")
        for backend, version in available.items()
    ]


def select_backends(config: ServeConfig) -> dict[str, str]:
    """The backend of each model; empty if unknown: without PyTorch, or with a wrong folder of graphs."""
    try:
        return choose_backends(config)
    except (ImportError, ValueError):
        return {}


def check_selection(
    config: ServeConfig,
    selected: Mapping[str, str],
    available: Mapping[str, str | Unavailable],
    device: str,
    gpu: Gpu | None,
) -> list[CheckResult]:
    """Which backend the settings select for each model, and whether it can run with these options."""
    if not selected:
        return []  # the check of the files reports the wrong folder, that of the software the missing PyTorch
    names = ", ".join(f"{model} {backend}" for model, backend in selected.items())
    results = [CheckResult(OK, "backends", f"{names}, on {device}")]
    for backend in dict.fromkeys(selected.values()):
        version = available[backend]
        if isinstance(version, Unavailable) and version is not NO_TORCH:  # the check of the software reports that
            message = f"selected, but cannot run: {version.reason}"
            results.append(CheckResult(ERROR, f"backend {backend}", message, version.action))
    if config.fp8 and gpu is not None and not (gpu.has_fp8 and config.dtype in (AUTO, "bfloat16")):
        message = f"needs bfloat16 and compute capability 8.9 or later, got dtype {config.dtype} and {gpu.name}"
        results.append(CheckResult(ERROR, "fp8", message, 'fp8 = false, or dtype = "auto" and another GPU'))
    if (config.fp8_decoder or config.fp8_attention) and not _is_installed("cudnn"):
        message = "not installed: fp8_decoder needs it; FP8 attention then uses only this project's kernel"
        level = ERROR if config.fp8_decoder else NOTE
        results.append(CheckResult(level, "cuDNN frontend", message, pip_install("cudnn")))
    if device == "cpu" and dit_parameters(config.model_config.dit) > MAX_CPU_PARAMETERS:
        message = f"preset {config.preset} takes minutes on a CPU for a chunk of 0.75 s"
        action = 'serve it on a GPU; preset = "demo" runs in real time on a CPU'
        results.append(CheckResult(WARNING, "device", message, action))
    return results
