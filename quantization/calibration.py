# SPDX-License-Identifier: Apache-2.0
"""Calibrates with NVIDIA ModelOpt: records the range of every layer's inputs while the model runner generates videos.

Called by `quantize`. The state is saved after every session, so an interrupted run continues. A maximum does not depend
on the order, so the result equals that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.models.vae.decoder import CausalConv3d
from quantization.checkpoint import InputStats, write
from quantization.recipes import Format

FILE = "calibration.safetensors"
MODELOPT_BITS = {torch.int8: 8, torch.float8_e4m3fn: (4, 3)}


@dataclasses.dataclass(kw_only=True)
class CalibrationState:
    """The ranges so far, and their file."""

    path: Path
    settings: Mapping[str, str]
    """What the calibration depends on; a run continues only with equal settings."""
    sessions: int = 0
    amax: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    """Largest absolute inputs by `model.layer`: [] or [1, ..., in]."""

    @classmethod
    def load(cls, path: Path, settings: Mapping[str, str]) -> CalibrationState:
        """Load the file, or return an empty state. Raises ValueError if its settings differ."""
        if not path.exists():
            return cls(path=path, settings=settings)
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            amax = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        for key, value in settings.items():
            if found.get(key) != value:
                raise ValueError(
                    f"{path}: got a calibration with {key} {found.get(key)}, expected {value}: "
                    "delete it or choose another folder"
                )
        return cls(path=path, settings=settings, sessions=int(found["sessions"]), amax=amax)

    def save(self) -> None:
        write(self.path, self.amax, {**self.settings, "sessions": str(self.sessions)})


def calibration_session(runner: ModelRunner, prompts: list[str], number: int) -> None:
    """Generate one video: the window fills and rolls; prompt switches recache before and after it is full."""
    capacity = runner.window.capacity
    switches = {capacity // 2: 1, capacity + 2: 2}
    text = prompts[number % len(prompts)]
    session = Session(id="calibration", prompt=Prompt(index=0, text=text), noise=SeededNoise(number), slot=0)
    for chunk in range(chunks_of_session(runner)):
        if chunk in switches:
            session.add_prompt(prompts[(number + switches[chunk]) % len(prompts)], NOW)
        runner.advance(session)


def chunks_of_session(runner: ModelRunner) -> int:
    return 2 * runner.window.capacity + 1


def calibrate(
    models: Mapping[str, nn.Module],
    formats: Mapping[str, Mapping[str, Format]],
    runner: ModelRunner,
    prompts: list[str],
    state: CalibrationState,
    on_session: Callable[[int], None],
) -> dict[str, dict[str, InputStats]]:
    """Input statistics of the layers in `formats` (by model, by layer), while `runner` generates a video per prompt.

    `runner` must run `models`. These are unusable afterwards: ModelOpt leaves its quantizers in them. `on_session` is
    called with the number of finished sessions, first with those of an earlier run.
    """
    mtq = _modelopt()
    _register_causal_conv3d()
    together = nn.ModuleDict(models)

    def run_sessions(_: nn.Module) -> None:
        quantizers = _enabled_input_quantizers(together)
        for name, amax in state.amax.items():
            quantizers[name]._calibrator._calib_amax = amax.to(runner.backends.device)
        on_session(state.sessions)
        for number in range(state.sessions, len(prompts)):
            calibration_session(runner, prompts, number)
            state.amax = {name: q._calibrator.compute_amax().float() for name, q in quantizers.items()}
            state.sessions = number + 1
            state.save()
            on_session(state.sessions)

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.inference_mode():
        warnings.filterwarnings("ignore", message=".* skip")  # SmoothQuant on layers that have no 8-bit inputs
        mtq.quantize(together, modelopt_config(formats), run_sessions)
    return {name: _input_stats(models[name], layers) for name, layers in formats.items()}


def modelopt_config(formats: Mapping[str, Mapping[str, Format]]) -> dict[str, Any]:
    """ModelOpt's configuration: disables all quantizers (LayerNorms have one by default) except those of `formats`."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    alphas = set()
    for model, layers in formats.items():
        for layer, format in layers.items():
            bits, name = MODELOPT_BITS[format.dtype], f"{model}.{layer}"
            entries.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}})
            if format.inputs:
                entries.append({"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}})
            if format.smoothing is not None:
                alphas.add(format.smoothing)
    assert len(alphas) <= 1, "ModelOpt smooths all layers of a run alike"
    algorithm = {"method": "smoothquant", "alpha": alphas.pop()} if alphas else {"method": "max"}
    return {"quant_cfg": entries, "algorithm": algorithm}


def _modelopt() -> Any:
    """Import ModelOpt's quantization lazily: it takes seconds."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="transformers .* is not tested")
        import modelopt.torch.quantization
    return modelopt.torch.quantization


def _register_causal_conv3d() -> None:
    """Register CausalConv3d: ModelOpt ignores subclasses of nn.Conv3d with another forward."""
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules.quant_module import QuantLinearConvBase

    if CausalConv3d not in QuantModuleRegistry:
        QuantModuleRegistry.register({CausalConv3d: "CausalConv3d"})(QuantLinearConvBase)


def _enabled_input_quantizers(model: nn.Module) -> dict[str, Any]:
    suffix = ".input_quantizer"
    modules: dict[str, Any] = dict(model.named_modules())
    return {
        name.removesuffix(suffix): module
        for name, module in modules.items()
        if name.endswith(suffix) and module.is_enabled
    }


def _input_stats(model: nn.Module, layers: Mapping[str, Format]) -> dict[str, InputStats]:
    found = {}
    for layer, format in layers.items():
        if not format.inputs:
            continue
        quantizer: Any = model.get_submodule(layer).input_quantizer
        if format.smoothing is None:
            found[layer] = InputStats(amax=quantizer.amax.float().cpu())
        else:
            amax, smoothing = quantizer._amax_for_smoothing, quantizer.pre_quant_scale
            found[layer] = InputStats(amax=amax.flatten().float().cpu(), smoothing=smoothing.flatten().float().cpu())
    return found


def settings_of(
    formats: Mapping[str, Mapping[str, Format]], prompts: list[str], sources: Mapping[str, str], variant: str
) -> dict[str, str]:
    """The settings of a calibration, stored as metadata of its file; `formats` by model, by layer."""
    layers = [f"{model}.{layer}: {format}" for model, own in formats.items() for layer, format in own.items()]
    kinds = {f"{model} {format}" for model, own in formats.items() for format in own.values()}
    return {
        "formats": ", ".join(sorted(kinds)),
        "layers": hashlib.sha256("\n".join(layers).encode()).hexdigest(),
        "prompts": json.dumps(prompts),
        "sources": json.dumps(dict(sources), sort_keys=True),
        "variant": variant,
    }
