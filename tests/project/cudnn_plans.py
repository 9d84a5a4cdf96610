# SPDX-License-Identifier: Apache-2.0
"""Checks without a GPU that cuDNN has plans for our FP8 graphs: `python -m tests.project.cudnn_plans`.

cuDNN can plan for given device properties. It gets the fused backend's graphs at the served sizes; for some of them it
also compiles the kernel, whose matrix instructions are then listed. gcc builds stubs of the driver and the CUDA
runtime, so nothing runs. NVIDIA's wheels are kept in the user's cache folder.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor

from longlive_serve.backends.fused import cudnn_attention, cudnn_convolution
from longlive_serve.backends.fused.cudnn_builds import Builds, SerializedPlan, Task
from longlive_serve.backends.fused.cudnn_graphs import KERNEL_CONFIG_IDS, GraphSpec, Make, Tensors, kernels
from longlive_serve.backends.fused.cudnn_plan_cache import PlanCache
from longlive_serve.config.presets import PRESETS

ROOT = Path(__file__).parents[2]
HOME = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "longlive-serve", "cudnn_plans")
WHEELS = ("nvidia-cudnn-cu13==9.19.0.56", "nvidia-cuda-nvrtc==13.0.88", "nvidia-cudnn-frontend==1.22.0")
"""The versions that torch 2.11 depends on, with the compiler."""
BUILT = (
    "attention, 3 to 12 frames",
    "convolution, 96 to 96 channels, 12 frames, 480x832, and a sum",
)
H200 = {
    "cudaDeviceId": 0,
    "deviceName": "NVIDIA H200",
    "deviceVer": 900,
    "driverVer": 13000,
    "isTccDriver": 0,
    "l2CacheSize": 62914560,
    "maxBlockSize": [1024, 1024, 64],
    "maxCtasPerSM": 32,
    "maxGridSize": [2147483647, 65535, 65535],
    "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152,
    "maxSharedMemoryPerBlockOptin": 232448,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerSM": 2048,
    "memClockRateKHz": 3201000,
    "memoryBusWidth": 6144,
    "multiProcessorCount": 132,
    "oversizedSharedMemoryPerBlock": 0,
    "pciDeviceId": 0,
    "regsPerBlock": 65536,
    "reservedSharedMemoryPerBlock": 1024,
    "smClockRateKHz": 1980000,
    "smCountOrigin": 0,
    "supportCoopLaunch": 1,
    "totalGlobalMem": 150754820096,
    "version": 1,
    "warpSize": 32,
}
_DRIVER = """
cuCtxGetLimit cuCtxPopCurrent cuCtxPushCurrent cuGetErrorName cuGetErrorString cuKernelSetAttribute
cuLaunchCooperativeKernel cuLaunchKernel cuLaunchKernelEx cuLibraryLoadFromFile cuLibraryUnload cuLinkAddData
cuLinkComplete cuLinkCreate cuLinkDestroy cuModuleGetFunction cuModuleLoadData cuModuleUnload
cuOccupancyMaxPotentialClusterSize cuStreamGetCtx cuTensorMapEncodeIm2col cuTensorMapEncodeTiled
"""
"""Driver functions that cuDNN looks up before it plans."""
_LOADER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
static char something[64];
int cuCtxGetCurrent(void **context) { *context = something; return 0; }
int cuDeviceGet(int *device, int number) { return *device = 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuKernelGetAttribute(int *value) { return *value = 0; }
int cuLibraryGetKernel(void **kernel) { *kernel = something; return 0; }
int cuLibraryLoadData(void **library, const unsigned char *elf) {
    static int number = 0;
    uint64_t programs = *(uint64_t *)(elf + 32) + *(uint16_t *)(elf + 54) * *(uint16_t *)(elf + 56);
    uint64_t sections = *(uint64_t *)(elf + 40) + *(uint16_t *)(elf + 58) * *(uint16_t *)(elf + 60);
    char path[4096];
    snprintf(path, sizeof path, "%s/%04d.cubin", getenv("KERNELS"), number++);
    FILE *file = fopen(path, "wb");
    fwrite(elf, 1, programs > sections ? programs : sections, file);
    fclose(file);
    *library = something;
    return 0;
}
"""
"""Stubs for loading a compiled kernel; they write it to a file."""
_RUNTIME = """
#include <string.h>
int cudaGetDevice(int *device) { return *device = 0; }
int cudaGetDeviceProperties(char *facts, int device) {
    memset(facts, 0, 1008);
    *(int *)(facts + 360) = CAPABILITY / 100;
    *(int *)(facts + 364) = CAPABILITY % 100 / 10;
    return 0;
}
int cudaGetDeviceProperties_v2(char *facts, int device) { return cudaGetDeviceProperties(facts, device); }
"""
"""Stubs for the frontend, which queries the compute capability."""
_PRODUCTS = "long cublasLtGetVersion(void) { return 130100; }\n"


def libraries() -> Path:
    """The folder of the unpacked wheels; downloads missing ones. Raises RuntimeError."""
    folder = HOME / "-".join(wheel.rpartition("=")[2] for wheel in WHEELS)
    if not folder.exists():
        HOME.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        with tempfile.TemporaryDirectory(dir=HOME) as made:
            _run(*pip, "--only-binary=:all:", "--dest", made, *WHEELS)
            for wheel in Path(made).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(Path(made, "unpacked"))
            Path(made, "unpacked").rename(folder)
    return folder


def plans(capability: int, build: bool = True) -> dict[str, str]:
    """cuDNN's plans by graph, for an H200 with this compute capability (900 is its own), or the reason for none.

    With `build`, also the matrix instructions of the first plan of the graphs in BUILT. Raises RuntimeError if cuDNN
    cannot be loaded.
    """
    folder = libraries()
    with tempfile.TemporaryDirectory() as made:
        driver = "".join(f"int {function}(void) {{ return 0; }}\n" for function in _DRIVER.split())
        sources = {"libcuda.so.1": driver + _LOADER, "libcudart.so.13": _RUNTIME, "libcublasLt.so.13": _PRODUCTS}
        for name, source in sources.items():
            Path(made, f"{name}.c").write_text(source, encoding="utf-8")
            options = [f"-DCAPABILITY={capability}", "-shared", "-fPIC", f"-Wl,-soname,{name}"]
            _run("gcc", *options, "-o", str(Path(made, name)), str(Path(made, f"{name}.c")))
        env = os.environ | {
            "LD_LIBRARY_PATH": f"{made}:{folder / 'nvidia/cudnn/lib'}:{folder / 'nvidia/cu13/lib'}",
            "PYTHONPATH": f"{folder}:{ROOT}",
            "KERNELS": made,
        }
        built = BUILT if build else ()
        printed = _run(sys.executable, "-m", "tests.project.cudnn_plans", str(capability), *built, env=env)
        found: dict[str, str] = json.loads(printed.splitlines()[-1])
        kernels = sorted(Path(made).glob("*.cubin"))
        return found | {f"kernel of {name}": _products(file) for name, file in zip(built, kernels, strict=True)}


def _products(kernel: Path) -> str:
    """The matrix instructions of a kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return " ".join(sorted(set(re.findall(r"[HQ]G?MMA\.\S+", _run(str(tool), "-sass", str(kernel))))))


def _run(*command: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _graphs() -> Iterator[tuple[str, Make, Tensors]]:
    """All graphs of the fused backend at full size, with printable names."""
    config, fp8 = PRESETS["longlive-1.3b"], torch.float8_e4m3fn
    heads, size, rows = config.dit.num_heads, config.dit.head_dim, config.tokens_per_frame
    for queries, keys in ((3, 3), (3, 6), (3, 9), (3, 12), (6, 6), (9, 9), (9, 12), (12, 12)):  # steps and recaches
        q, out = torch.empty(2, rows * queries, heads, size, dtype=fp8, device="meta").transpose(1, 2)
        k, v = torch.empty(2, heads, rows * 12, size, dtype=fp8, device="meta")[:, :, : rows * keys]
        part = cudnn_attention.AttentionTensor
        tensors: dict[int, Tensor] = {part.Q: q, part.K: k, part.V: v, part.OUT: out}
        yield f"attention, {queries} to {keys} frames", cudnn_attention.attention_graph, tensors
    widths = (384, 384, 0), (192, 384, 1), (384, 384, 1), (192, 192, 2), (96, 96, 3)
    sizes = [(width, frames) for width in widths for frames in sorted({1, *(n << min(width[2], 2) for n in (1, 2, 3))})]
    for (inputs, outputs, doublings), frames in sizes:  # the first latent frame; one, two, three latent frames
        place = config.latent_height << doublings, config.latent_width << doublings
        x, out, weight = (
            torch.empty(shape, device="meta").contiguous(memory_format=torch.channels_last_3d)
            for shape in ((1, inputs, frames + 2, *place), (1, outputs, frames, *place), (outputs, inputs, 3, 3, 3))
        )
        number, out, of = torch.empty(1, outputs, 1, 1, 1, device="meta"), out.bfloat16(), cudnn_convolution.ConvTensor
        given = {of.X: x.to(fp8), of.WEIGHT: weight.to(fp8), of.SCALE: number, of.BIAS: number, of.OUT: out}
        name = f"convolution, {inputs} to {outputs} channels, {frames} frames, {place[0]}x{place[1]}"
        yield name, cudnn_convolution.convolution_graph, given
        yield f"{name}, and a sum", cudnn_convolution.convolution_graph, given | {of.ADDED: out}


def _ask(capability: int, build: Sequence[str]) -> dict[str, str]:
    """Runs in the subprocess with the libraries."""
    import cudnn

    device = cudnn.create_device_properties(json.dumps(H200 | {"deviceVer": capability}))
    found = {}
    for name, make, tensors in _graphs():
        try:
            graph = make(cudnn, tensors, device_property=device)
            graph.validate()
            graph.build_operation_graph()
            plans = kernels(cudnn, graph, KERNEL_CONFIG_IDS if name in build else ())
            if name in build:
                graph.build_plan_at_index(0)
        except cudnn.cudnnGraphNotSupportedError as error:
            found[name] = f"none: {str(error).splitlines()[0]}"
        else:
            found[name] = ", ".join(plans)
    return found | ({"built beside": _build_beside(found)} if build else {})


def _build_beside(found: Mapping[str, str]) -> str:
    """Build three plans like the server, in processes, then load them from the cache. Returns the size of each. Running
    them would need a device."""
    graphs = {name: GraphSpec.of(make, tensors) for name, make, tensors in _graphs()}
    tasks = [Task(graphs[f"attention, 3 to {keys} frames"], "eng2_k24=7") for keys in (3, 6)]
    tasks.append(Task(graphs["attention, 3 to 9 frames"], "eng2_k24=63"))  # this kernel does not exist
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KERNELS"] = folder  # read by the driver stub
        first = Builds(json.dumps(H200), PlanCache(Path(folder, "cache")), processes=2)(tasks)
        again = Builds(json.dumps(H200), PlanCache(Path(folder, "cache")), processes=2)
        loaded = {*Path(folder).glob("*.cubin")}
        assert again(tasks) == first
        assert loaded == {*Path(folder).glob("*.cubin")}, "built twice instead of cached"
    assert all(isinstance(one, SerializedPlan) for one in first), first
    kernels = [(one.kernel, len(one.plan)) for one in first if isinstance(one, SerializedPlan)]
    assert [kernel for kernel, _ in kernels[:2]] == ["eng2_k24=7"] * 2
    assert kernels[2][0] in found["attention, 3 to 9 frames"]
    return ", ".join(f"{kernel} {size} bytes" for kernel, size in kernels)


def main() -> int:
    if len(sys.argv) > 1:
        print(json.dumps(_ask(int(sys.argv[1]), sys.argv[2:])))
        return 0
    found = plans(H200["deviceVer"])  # type: ignore[arg-type]
    print("\n".join(f"{name}: {plans}" for name, plans in found.items()))
    return int(any(plans.startswith("none") for plans in found.values()))


if __name__ == "__main__":
    sys.exit(main())
