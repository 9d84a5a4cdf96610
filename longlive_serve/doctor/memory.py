# SPDX-License-Identifier: Apache-2.0
"""What the settings take of the device's memory, and how many sessions fit, by `memory_model.py`.

Called by the command line.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.config.presets import (
    DECODERS,
    DIT,
    MODELS,
    PRESETS,
    TEXT_ENCODER,
    TINY,
    TINY_DECODER,
    VAE_DECODER,
)
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, RANDOM_WEIGHTS, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, CheckResult, size
from longlive_serve.doctor.gpu import MIB, Gpu
from longlive_serve.doctor.memory_model import ServerMemory, parameters, server_memory
from longlive_serve.triton_server.find_triton import PACKAGE_PARENT

MEASURED = PACKAGE_PARENT / "results" / "gpu.json"
SECTION = "benchmarks.engines"
COMMON_GPUS = {  # what their drivers say that they have
    "H200": 143771 * MIB,
    "H100 80 GB": 81559 * MIB,
    "L40S": 46068 * MIB,
    "RTX 4090": 24564 * MIB,
}
MANY = 1000
FULL = PRESETS["longlive-1.3b"]
MEASURE = "how many it keeps up with, the benchmark tells: python -m benchmarks.engines"
SHORT = {TEXT_ENCODER: "text encoder", DIT: "DiT", VAE_DECODER: "VAE decoder", TINY_DECODER: "tiny decoder"}


def precision(config: ServeConfig, choice: Mapping[str, str], device: str) -> str:
    """What the DiT and its cache are held in, as `build_backends` decides it."""
    if config.dtype != AUTO:
        return config.dtype
    default = "float32" if device == "cpu" else "bfloat16"
    folder = {ONNXRUNTIME: config.graphs, TENSORRT: config.tensorrt_engines}.get(choice.get(DIT, TORCH), "")
    with contextlib.suppress(ValueError, KeyError):  # told where files are looked for
        return Manifest.read(Path(folder)).graphs[DIT].dtype if folder else default
    return default


def needed(config: ServeConfig, choice: Mapping[str, str], device: str) -> ServerMemory:
    return server_memory(
        config.model_config,
        dtype=precision(config, choice, device),
        decoder=config.decoder,
        fused_dit=choice.get(DIT) == FUSED,
        fused_decoder=choice.get(VAE_DECODER) == FUSED,
        fp8=config.fp8,
        fp8_attention=config.fp8_attention,
        fp8_decoder=config.fp8_decoder,
        on_cuda=device != "cpu",
    )


def memory_results(
    config: ServeConfig, choice: Mapping[str, str], device: str, gpu: Gpu | None, main: float
) -> list[CheckResult]:
    """`gpu`: the one that would be used; `main`: bytes of main memory that may be."""
    memory = needed(config, choice, device)
    kind = "FP8 and " * config.fp8 + precision(config, choice, device)
    parts = ", ".join(f"{SHORT[name]} {size(count)}" for name, count in memory.models.items())
    session = memory.session
    held = (
        f"KV cache {size(session.kv_slot)}, prompt {size(session.prompt_kv)}, "
        f"decoder's cache {size(session.decoder_cache)}, latents {size(session.latents)}"
    )
    results = [
        CheckResult(OK, "models", f"{size(sum(memory.models.values()))} in {kind}: {parts}"),
        CheckResult(OK, "a session", f"{size(session.total)}: {held}"),
    ]
    if gpu is not None:
        results.append(_slots(config, memory, gpu.memory, gpu.name))
        results += _loading(config, choice, main)
        results.append(_by_compute(config, gpu))
    elif device == "cpu":
        results.append(_slots(config, memory, int(main), "main memory"))
        text = "fewer than fit: the server measures when it starts how many it keeps up with, and admits no more"
        results.append(CheckResult(NOTE, "by compute", text, "make bench shows what viewers notice"))
    return results if gpu is not None else [*results, _on_gpus()]


def _slots(config: ServeConfig, memory: ServerMemory, there: int, where: str) -> CheckResult:
    need, fit = memory.total(config.slots), memory.sessions_in(there)
    text = (
        f"{config.slots} slots take {size(need)}, {size(memory.working)} of it to work in, of {size(there)} ({where})"
    )
    if need > there:
        ways = [f"slots = {fit}"] if fit else ["more memory"]
        if config.decoder != TINY:
            ways.append('decoder = "tiny"')
        return CheckResult(PROBLEM, "by memory", f"{text}: {fit or 'no'} sessions fit", " or ".join(ways))
    return CheckResult(OK, "by memory", f"{text}: {fit if fit < MANY else f'more than {MANY}'} sessions fit")


def _loading(config: ServeConfig, choice: Mapping[str, str], main: float) -> list[CheckResult]:
    """Random weights are made in main memory, in float32; checkpoints are read piece by piece."""
    made = [name for name in MODELS if choice.get(name, TORCH) in (TORCH, FUSED)]
    need = max((4 * parameters(config.model_config, name) for name in made), default=0)
    if config.weights != RANDOM_WEIGHTS or need < main:
        return []
    text = f"random weights take {size(need)} of main memory for a while, there are {size(main)}"
    return [CheckResult(WARNING, "loading", text, "more memory or swap, or checkpoints")]


def _on_gpus() -> CheckResult:
    """Sessions of the full size, as no small one fills a GPU."""
    wan, tiny = (server_memory(FULL, dtype="bfloat16", decoder=decoder) for decoder in DECODERS)
    fits = ", ".join(
        f"{name} {wan.sessions_in(there)} ({tiny.sessions_in(there)})" for name, there in COMMON_GPUS.items()
    )
    text = f"sessions of {FULL.name} that fit by memory (with the tiny decoder): {fits}"
    return CheckResult(NOTE, "on a GPU", text, MEASURE)


def _by_compute(config: ServeConfig, gpu: Gpu) -> CheckResult:
    try:
        record = json.loads(MEASURED.read_text(encoding="utf-8"))
        run, kind = record[SECTION], "tiny_vae" if config.decoder == TINY else "full_vae"
        sessions, row = record[f"live_sessions_{kind}"], run["figures_of"][kind]
        if run["preset"] != config.preset or sessions is None:
            raise KeyError(config.preset)
        text = f"{sessions} live sessions at 16 fps with {row}, measured on {run['hardware']}"
    except (OSError, ValueError, KeyError, TypeError):
        text = f"not measured for preset {config.preset}; it may be fewer sessions than fit"
        return CheckResult(NOTE, "by compute", text, MEASURE)
    if not str(run["hardware"]).startswith(gpu.name):
        return CheckResult(NOTE, "by compute", f"{text}; here is {gpu.name}", MEASURE)
    return CheckResult(OK, "by compute", text)
