# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA GPUs of this machine, as nvidia-smi or PyTorch reports them, and the one that the server would use.

Called by the command line. The checks of backends and memory get the GPU that would be used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
from pathlib import Path

from longlive_serve.doctor.check_result import ERROR, NOTE, OK, WARNING, CheckResult, format_bytes
from longlive_serve.doctor.software import torch_cuda

FIELDS = "name,memory.total,memory.free,driver_version,compute_cap,uuid"
MIN_FP8_CAPABILITY = (8, 9)
MIN_DRIVER = {11: 450, 12: 525, 13: 580}  # by major version of CUDA
PCI_DEVICES, NVIDIA_ID, DISPLAY_CLASS = Path("/sys/bus/pci/devices"), "0x10de", "0x03"
MIB = 2**20
DESKTOP_MEMORY = 2**30  # more than a desktop uses
INSTALL_CUDA_TORCH = "install PyTorch for CUDA: https://pytorch.org/get-started/locally"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU, as its driver describes it."""

    name: str
    memory: int
    free: int
    driver: str
    capability: tuple[int, int]
    uuid: str = ""
    is_visible: bool = False
    """Whether its index counts only the GPUs that CUDA_VISIBLE_DEVICES names."""

    @property
    def has_fp8(self) -> bool:
        return self.capability >= MIN_FP8_CAPABILITY


def find_gpus() -> list[Gpu]:
    """All GPUs in the driver's order; empty also where neither nvidia-smi nor PyTorch works."""
    for query in (_query_nvidia_smi, _query_torch):
        with contextlib.suppress(Exception):  # each raises its own kinds of errors
            if gpus := query():
                return gpus
    return []


def _query_nvidia_smi() -> list[Gpu]:
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    gpus = []
    for line in result.stdout.splitlines():
        name, memory, free, driver, capability, uuid = (field.strip() for field in line.split(","))
        major, minor = map(int, capability.split("."))
        gpu = Gpu(name=name, memory=int(memory) * MIB, free=int(free) * MIB, driver=driver, capability=(major, minor))
        gpus.append(dataclasses.replace(gpu, uuid=uuid))
    return gpus


def _query_torch() -> list[Gpu]:
    if not torch_cuda():
        return []
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, memory = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        gpu = Gpu(name=name, memory=memory, free=free, driver="unknown", capability=capability, is_visible=True)
        gpus.append(gpu)
    return gpus


def select_gpu(gpus: list[Gpu], device: str) -> Gpu | None:
    """The GPU that `device` of the settings selects, among those that CUDA_VISIBLE_DEVICES names."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    if names is not None and not any(gpu.is_visible for gpu in gpus):
        by_index = {str(index): gpu for index, gpu in enumerate(gpus)}
        selected = [by_index.get(name.strip()) or _find_uuid(gpus, name.strip()) for name in names.split(",")]
        gpus = [gpu for gpu in selected if gpu is not None]
    suffix = device.partition(":")[2]
    index = int(suffix) if suffix.isdecimal() else 0
    return gpus[index] if device != "cpu" and index < len(gpus) else None


def _find_uuid(gpus: list[Gpu], uuid: str) -> Gpu | None:
    return next((gpu for gpu in gpus if uuid and gpu.uuid.startswith(uuid)), None)


def check_gpu(gpus: list[Gpu], gpu: Gpu | None, device: str) -> list[CheckResult]:
    """`gpu`: the selected one; `device`: as in the settings."""
    if not gpus:
        return [_check_no_gpu(device)]
    if gpu is None and device == "cpu":
        return [CheckResult(NOTE, "GPU", f"{gpus[0].name}, not used: device is cpu", 'device = "auto" uses it')]
    if gpu is None:
        message = f"no GPU {device} here (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')})"
        level = ERROR if device != "auto" else WARNING
        return [CheckResult(level, "GPU", message, "unset the variable, or name another device")]
    capability = "{}.{}".format(*gpu.capability)
    message = f"{gpu.name}, {format_bytes(gpu.memory)}, compute capability {capability}, driver {gpu.driver}"
    results = [CheckResult(OK, "GPU", message)]
    if len(gpus) > 1:
        message = f"{len(gpus)} found; a server uses one, here number {gpus.index(gpu)}, counted from 0"
        action = 'select another with device = "cuda:1" or CUDA_VISIBLE_DEVICES (with CUDA_DEVICE_ORDER=PCI_BUS_ID)'
        results.append(CheckResult(NOTE, "GPUs", message, action))
    if gpu.memory - gpu.free > DESKTOP_MEMORY:
        message = f"{format_bytes(gpu.memory - gpu.free)} in use, {format_bytes(gpu.free)} free"
        results.append(CheckResult(WARNING, "GPU memory", message, "nvidia-smi lists the processes that use it"))
    if gpu.has_fp8:
        results.append(CheckResult(OK, "FP8", "supported: fp8 = true with the backend fused, or FP8 engines"))
    else:
        message = f"not supported: it needs compute capability 8.9 or later, not {capability}"
        results.append(CheckResult(NOTE, "FP8", message, "serve in bfloat16"))
    return [*results, _check_torch(gpu, device)]


def _check_no_gpu(device: str) -> CheckResult:
    level = ERROR if device.startswith("cuda") else NOTE
    if _has_nvidia_device():
        message, action = "found on the PCI bus, but no driver answers", "install the driver; in Docker: --gpus all"
        return CheckResult(WARNING if level == NOTE else level, "GPU", message, action)
    action = "the demo model runs in real time on a CPU; the full size needs an NVIDIA GPU"
    return CheckResult(level, "GPU", "none found by nvidia-smi and PyTorch", action)


def _has_nvidia_device() -> bool:
    with contextlib.suppress(OSError):
        for device in PCI_DEVICES.iterdir():
            vendor, kind = ((device / name).read_text(encoding="utf-8") for name in ("vendor", "class"))
            if vendor.startswith(NVIDIA_ID) and kind.startswith(DISPLAY_CLASS):
                return True
    return False


def _check_torch(gpu: Gpu, device: str) -> CheckResult:
    """Whether the installed PyTorch can use the GPU."""
    version = torch_cuda()
    if not version:
        level = ERROR if device.startswith("cuda") else WARNING
        message = "PyTorch is not installed, or built without CUDA: the GPU would not be used"
        return CheckResult(level, "CUDA", message, INSTALL_CUDA_TORCH)
    min_driver, driver = MIN_DRIVER.get(int(version.split(".")[0]), 0), gpu.driver.split(".")[0]
    if driver.isdecimal() and int(driver) < min_driver:
        message = f"PyTorch is built for CUDA {version}, which needs driver {min_driver} or later, not {gpu.driver}"
        return CheckResult(ERROR, "CUDA", message, "install a newer driver, or PyTorch for an older CUDA")
    return CheckResult(OK, "CUDA", f"PyTorch is built for CUDA {version}")
