# SPDX-License-Identifier: Apache-2.0
"""Device memory that the settings need, and the number of sessions that fit, by `memory_model.py`.

Called by the command line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.config.presets import DECODERS, DIT, PRESETS, TEXT_ENCODER, TINY, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, TENSORRT, TORCH, ServeConfig
from longlive_serve.doctor.check_result import ERROR, NOTE, OK, CheckResult, format_bytes
from longlive_serve.doctor.gpu import MIB, Gpu
from longlive_serve.doctor.memory_model import ServerMemory, server_memory

COMMON_GPUS = {  # memory as their drivers report it
    "H200": 143771 * MIB,
    "H100 80 GB": 81559 * MIB,
    "L40S": 46068 * MIB,
    "RTX 4090": 24564 * MIB,
}
FULL = PRESETS["longlive-1.3b"]
MEASURE = "python -m benchmarks.engines measures how many sessions run in real time"
LABELS = {TEXT_ENCODER: "text encoder", DIT: "DiT", VAE_DECODER: "VAE decoder", TINY_DECODER: "tiny decoder"}


def dit_dtype(config: ServeConfig, backends: Mapping[str, str], device: str) -> str:
    """The dtype of the DiT and of its cache, as `build_backends` selects it."""
    if config.dtype != AUTO:
        return config.dtype
    default = "float32" if device == "cpu" else "bfloat16"
    folder = {ONNXRUNTIME: config.graphs, TENSORRT: config.tensorrt_engines}.get(backends.get(DIT, TORCH), "")
    with contextlib.suppress(ValueError, KeyError):  # the check of the files reports it
        return Manifest.read(Path(folder)).graphs[DIT].dtype if folder else default
    return default


def required_memory(config: ServeConfig, backends: Mapping[str, str], device: str) -> ServerMemory:
    return server_memory(
        config.model_config,
        dtype=dit_dtype(config, backends, device),
        decoder=config.decoder,
        fused_dit=backends.get(DIT) == FUSED,
        fused_decoder=backends.get(VAE_DECODER) == FUSED,
        fp8=config.fp8,
        fp8_attention=config.fp8_attention,
        fp8_decoder=config.fp8_decoder,
        on_cuda=device != "cpu",
    )


def check_memory(
    config: ServeConfig, backends: Mapping[str, str], device: str, gpu: Gpu | None, main_memory: float
) -> list[CheckResult]:
    """`backends`: by model; `gpu`: the selected one; `main_memory`: usable bytes."""
    memory = required_memory(config, backends, device)
    session = memory.session
    dtype = "FP8 and " * config.fp8 + dit_dtype(config, backends, device)
    models = ", ".join(f"{LABELS[name]} {format_bytes(size)}" for name, size in memory.models.items())
    parts = (
        f"KV cache {format_bytes(session.kv_slot)}, prompt {format_bytes(session.prompt_kv)}, "
        f"decoder's cache {format_bytes(session.decoder_cache)}, latents {format_bytes(session.latents)}"
    )
    results = [
        CheckResult(OK, "models", f"{format_bytes(sum(memory.models.values()))} in {dtype}: {models}"),
        CheckResult(OK, "session", f"{format_bytes(session.total)}: {parts}"),
    ]
    if gpu is not None:
        results.append(_check_slots(config, memory, gpu.memory, gpu.name))
    elif device == "cpu":
        results.append(_check_slots(config, memory, int(main_memory), "main memory"))
    message = "not checked: the server measures it at start, and admits no more sessions than run in real time"
    results.append(CheckResult(NOTE, "speed", message, MEASURE))
    return results if gpu is not None else [*results, _common_gpus()]


def _check_slots(config: ServeConfig, memory: ServerMemory, size: int, device: str) -> CheckResult:
    required, max_sessions = memory.total(config.slots), memory.max_sessions(size)
    message = (
        f"{config.slots} slots need {format_bytes(required)} of {format_bytes(size)} ({device}), "
        f"{format_bytes(memory.workspace)} of it as workspace; at most {max_sessions} sessions fit"
    )
    if required <= size:
        return CheckResult(OK, "slots", message)
    actions = [f"slots = {max_sessions}"] if max_sessions else ["more memory"]
    if config.decoder != TINY:
        actions.append('decoder = "tiny"')
    return CheckResult(ERROR, "slots", message, " or ".join(actions))


def _common_gpus() -> CheckResult:
    """For the full size; the small presets fill no GPU."""
    wan, tiny = (server_memory(FULL, dtype="bfloat16", decoder=decoder) for decoder in DECODERS)
    counts = (f"{name} {wan.max_sessions(size)} ({tiny.max_sessions(size)})" for name, size in COMMON_GPUS.items())
    message = f"sessions of {FULL.name} that fit in memory (with the tiny decoder): {', '.join(counts)}"
    return CheckResult(NOTE, "other GPUs", message, MEASURE)
