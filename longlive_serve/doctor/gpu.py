# SPDX-License-Identifier: Apache-2.0
"""Which NVIDIA GPU there is, asked of whoever can tell: nvidia-smi, NVML's Python package, PyTorch.

Called by the command line; the checks of backends and memory are told which GPU would be used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult, size
from longlive_serve.doctor.software import torch_cuda

FIELDS = "name,memory.total,memory.free,driver_version,compute_cap,uuid"
FP8_FROM = (8, 9)
DRIVER_FOR = {11: 450, 12: 525, 13: 580}  # the least driver for a major version of CUDA
PCI, NVIDIA, DISPLAY = Path("/sys/bus/pci/devices"), "0x10de", "0x03"
BY_BUS = "PCI_BUS_ID"
MIB = 2**20
IN_USE = 2**30  # by others: more than a desktop takes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory: int
    free: int
    driver: str
    capability: tuple[int, int]
    uuid: str = ""
    visible: bool = False
    """It is counted among those that CUDA_VISIBLE_DEVICES leaves, and not among all."""

    @property
    def has_fp8(self) -> bool:
        return self.capability >= FP8_FROM


def find_gpus() -> list[Gpu]:
    """All of them, in the driver's order; none also where nobody can tell."""
    ways: tuple[Callable[[], list[Gpu]], ...] = (_by_nvidia_smi, _by_nvml, _by_torch)
    for way in ways:
        with contextlib.suppress(Exception):  # each has its own kinds, and the next one may know
            if gpus := way():
                return gpus
    return []


def _by_nvidia_smi() -> list[Gpu]:
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    gpus = []
    for line in done.stdout.splitlines():
        name, memory, free, driver, capability, uuid = (field.strip() for field in line.split(","))
        gpus.append(_gpu(name, int(memory) * MIB, int(free) * MIB, driver, capability, uuid))
    return gpus


def _by_nvml() -> list[Gpu]:
    import pynvml  # of nvidia-ml-py, which other packages bring

    pynvml.nvmlInit()
    gpus = []
    for index in range(pynvml.nvmlDeviceGetCount()):
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        capability = "{}.{}".format(*pynvml.nvmlDeviceGetCudaComputeCapability(handle))
        name, driver = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlSystemGetDriverVersion()
        gpus.append(_gpu(name, memory.total, memory.free, driver, capability, pynvml.nvmlDeviceGetUUID(handle)))
    return gpus


def _by_torch() -> list[Gpu]:
    if not torch_cuda():
        return []
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        capability = "{}.{}".format(*torch.cuda.get_device_capability(index))
        gpu = _gpu(torch.cuda.get_device_name(index), memory, free, "unknown", capability, "")
        gpus.append(dataclasses.replace(gpu, visible=True))
    return gpus


def _gpu(name: str, memory: int, free: int, driver: str, capability: str, uuid: str) -> Gpu:
    major, _, minor = capability.partition(".")
    pair = int(major), int(minor)
    return Gpu(name=name, memory=memory, free=free, driver=driver, capability=pair, uuid=uuid)


def used_gpu(gpus: list[Gpu], device: str) -> Gpu | None:
    """The one that `device` of the settings means, among those that CUDA_VISIBLE_DEVICES leaves."""
    visible, names = gpus, os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None and not any(gpu.visible for gpu in gpus):
        by_name = {str(number): gpu for number, gpu in enumerate(gpus)}
        chosen = [by_name.get(name.strip()) or _with_uuid(gpus, name.strip()) for name in names.split(",")]
        visible = [gpu for gpu in chosen if gpu is not None]
    index = device.partition(":")[2]
    number = int(index) if index.isdecimal() else 0
    return visible[number] if device != "cpu" and number < len(visible) else None


def _with_uuid(gpus: list[Gpu], uuid: str) -> Gpu | None:
    return next((gpu for gpu in gpus if uuid and gpu.uuid.startswith(uuid)), None)


def gpu_results(gpus: list[Gpu], used: Gpu | None, device: str) -> list[CheckResult]:
    """`device`: as the settings have it."""
    if not gpus:
        return [_no_gpu(device)]
    if used is None and device == "cpu":
        return [
            CheckResult(NOTE, "GPU", f"{gpus[0].name}, not used", 'the settings have device = "cpu"; "auto" uses it')
        ]
    if used is None:
        variable = os.environ.get("CUDA_VISIBLE_DEVICES")
        text = f"device {device} is none of those here (CUDA_VISIBLE_DEVICES={variable})"
        return [CheckResult(PROBLEM if device != "auto" else WARNING, "GPU", text, "unset it, or name another device")]
    capability = "{}.{}".format(*used.capability)
    text = f"{used.name}, {size(used.memory)}, compute capability {capability}, driver {used.driver}"
    results = [CheckResult(OK, "GPU", text)]
    if len(gpus) > 1:
        number = gpus.index(used)
        action = 'one server uses one; CUDA_VISIBLE_DEVICES or device = "cuda:1" chooses another'
        if len({gpu.name for gpu in gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != BY_BUS:
            action += f"; with CUDA_DEVICE_ORDER={BY_BUS} they are numbered as here"
        results.append(
            CheckResult(NOTE, "GPUs", f"{len(gpus)} here; number {number} would be used (the first is 0)", action)
        )
    if used.memory - used.free > IN_USE:
        text = f"{size(used.memory - used.free)} of it are taken: {size(used.free)} are free"
        results.append(CheckResult(WARNING, "GPU memory", text, "nvidia-smi shows by whom; end it, or serve elsewhere"))
    if used.has_fp8:
        text = "possible: backend fused with fp8 = true, and fp8_attention = true, or FP8 engines"
        results.append(CheckResult(OK, "FP8", text))
    else:
        action = "serve in bfloat16; FP8 is for Ada, Hopper and later"
        results.append(
            CheckResult(NOTE, "FP8", f"not possible: it takes compute capability 8.9, not {capability}", action)
        )
    return results + _fit_of_torch(used, device)


def _no_gpu(device: str) -> CheckResult:
    level = PROBLEM if device.startswith("cuda") else NOTE
    if _on_the_bus():
        text = "an NVIDIA device is on the bus, but no driver answers"
        return CheckResult(
            WARNING if level == NOTE else level, "GPU", text, "install its driver; in Docker: --gpus all"
        )
    action = "the CPU serves the demo model in real time; the full size takes an NVIDIA GPU"
    return CheckResult(level, "GPU", "none (asked nvidia-smi, NVML and PyTorch)", action)


def _on_the_bus() -> bool:
    with contextlib.suppress(OSError):
        for device in PCI.iterdir():
            vendor, kind = (
                (device / "vendor").read_text(encoding="utf-8"),
                (device / "class").read_text(encoding="utf-8"),
            )
            if vendor.startswith(NVIDIA) and kind.startswith(DISPLAY):
                return True
    return False


def _fit_of_torch(gpu: Gpu, device: str) -> list[CheckResult]:
    """Whether the installed PyTorch can use the GPU."""
    built_for = torch_cuda()
    if not built_for:
        level = PROBLEM if device.startswith("cuda") else WARNING
        text = "PyTorch is not installed, or built without CUDA: the GPU would not be used"
        return [CheckResult(level, "CUDA", text, "install PyTorch for CUDA: https://pytorch.org/get-started/locally")]
    least, driver = DRIVER_FOR.get(int(built_for.split(".")[0]), 0), gpu.driver.split(".")[0]
    if driver.isdecimal() and int(driver) < least:
        text = f"PyTorch is built for CUDA {built_for}, which takes driver {least} or later, not {gpu.driver}"
        action = "a newer driver, or PyTorch for an older CUDA: https://pytorch.org/get-started/locally"
        return [CheckResult(PROBLEM, "CUDA", text, action)]
    return [CheckResult(OK, "CUDA", f"PyTorch is built for CUDA {built_for}")]
