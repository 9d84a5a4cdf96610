# SPDX-License-Identifier: Apache-2.0
"""One model's checkpoint: maps tensor names to ours, checks all of them, then loads the tensors one by one.

Created by `loader.ModelLoader`. Only the model and one piece of the file are in memory at a time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longlive_serve.config.presets import DIT, TEXT_ENCODER, TINY_DECODER, VAE_DECODER, ModelConfig
from longlive_serve.config.serve_config import Adapter
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.quantization.int8_fp8_layers import install, quantized_layers
from longlive_serve.models.text_encoder import TextEncoder, wan_names
from longlive_serve.models.vae.decoder import VAEDecoder
from longlive_serve.models.vae.tiny_decoder import TinyDecoder
from longlive_serve.weights.diffusers_mapping import from_diffusers
from longlive_serve.weights.layouts import (
    CONVERTED,
    CONVERTED_FILE,
    DIFFUSERS,
    LONGLIVE,
    QUANTIZED,
    WAN,
    CheckpointFile,
)
from longlive_serve.weights.lora import Updates, merged, read_adapters
from longlive_serve.weights.tensor_files import is_mapped, listed, metadata, read_tensors, sha256, streamed

log = logging.getLogger(__name__)

MADE_OF = "made_of"  # metadata key of a converted file: JSON with `lora` (each with its `sha256`) and `use_ema`
GENERATOR_KEYS, EMA_KEYS = ("generator", "model"), ("generator_ema",)
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")  # left in names by training
_CLASSES: dict[str, Callable[[Any], nn.Module]] = {
    TEXT_ENCODER: TextEncoder,
    DIT: CausalDiT,
    VAE_DECODER: VAEDecoder,
    TINY_DECODER: TinyDecoder,
}
_OURS = {VAE_DECODER: ("decoder.", "conv2."), TINY_DECODER: ("decoder.",)}  # these files also contain encoders


def build(name: str, config: ModelConfig) -> nn.Module:
    """A model with random weights, on the default device."""
    return _CLASSES[name](getattr(config, name if name != VAE_DECODER else "vae"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's file, and the adapters to merge into it."""

    name: str
    config: ModelConfig
    file: CheckpointFile
    adapters: Sequence[Adapter] = ()
    use_ema: bool = False

    def load_model(self, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
        """The model with these weights, in evaluation mode. Raises ValueError if the file does not fit the model.

        Quantized weights and scales stay in the dtypes of the file.
        """
        log.info("%s: %s, %s layout%s", self.name, self.file.path, self.file.kind, ", EMA" if self.use_ema else "")
        with torch.device("meta"):
            model = build(self.name, self.config)
        for module in model.modules():
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, buffer.to(dtype))  # constants, not in any file
        self._install_quantized(model)
        materialize(model, self.tensors(model), device, dtype)
        return model.eval()

    def tensors(self, model: nn.Module | None = None) -> Iterator[tuple[str, Tensor]]:
        """An iterator over the tensors under our names: float32 if adapters are merged into it, else as in the file.

        The call checks all against `model` (default: the configuration's). Raises ValueError. Keep no references.
        """
        if model is None:
            with torch.device("meta"):
                model = build(self.name, self.config)
        state = self.state()
        self._check(state, model)
        updates = self._updates(state)
        mapped = is_mapped(self.file.path)
        return ((name, merged(tensor, updates.get(name, ()))) for name, tensor in streamed(self.state, mapped))

    def state(self) -> dict[str, Tensor]:
        """The file's tensors under our names, without adapters, in the file's dtypes, memory-mapped."""
        kind, path = self.file.kind, self.file.path
        if not path.exists():
            if kind == DIFFUSERS:
                raise ValueError(f"{path}: no such file, but shards: expected the index of the shards. Fetch it")
            text = f"{path}: no such file, nor {CONVERTED_FILE.format(self.name)}"
            raise ValueError(f"{text}; expected the {self.name} in one of them. Fetch it")
        if self.use_ema and self.name == DIT and kind not in (LONGLIVE, CONVERTED):
            raise ValueError(f"{path}: got {kind} layout with use_ema, expected a torch file with {EMA_KEYS[0]}")
        if kind == LONGLIVE:
            return strip_wrapper_prefixes(
                read_tensors(path, EMA_KEYS if self.use_ema else GENERATOR_KEYS, required=self.use_ema)
            )
        state = read_tensors(path)
        if kind == DIFFUSERS:
            return from_diffusers(self.name, state)
        if kind == WAN and self.name in _OURS:
            return {key: tensor for key, tensor in state.items() if key.startswith(_OURS[self.name])}
        if kind == WAN and self.name == TEXT_ENCODER:
            names = wan_names(self.config.text_encoder.num_layers)
            return {names.get(key, key): tensor for key, tensor in state.items()}
        return strip_wrapper_prefixes(state) if kind == WAN else state

    def origin(self) -> dict[str, Any]:
        """The origin of a converted file, from its metadata; empty for other files. Raises ValueError."""
        about = metadata(self.file.path) if self.file.kind == CONVERTED else {}
        origin: dict[str, Any] = json.loads(about.get(MADE_OF, "{}"))
        return origin

    def _install_quantized(self, model: nn.Module) -> None:
        if self.file.kind != QUANTIZED:
            return
        try:
            install(model, quantized_layers(self.state(), "cpu"))
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{self.file.path}: quantized layers of another model: {error}") from None

    def _check(self, state: Mapping[str, Tensor], model: nn.Module) -> None:
        shown = {}
        if self.file.kind == WAN and self.name == TEXT_ENCODER:  # the file's own names
            shown = {ours: wan for wan, ours in wan_names(self.config.text_encoder.num_layers).items()}
        if errors := state_dict_mismatches(state, model.state_dict(), shown):
            raise ValueError(
                _mismatch_message(self.file.path, errors)
                + f"\nExpected the {self.name} of preset {self.config.name}: give another file or another preset"
            )
        if self.use_ema and self.file.kind == CONVERTED and not self.origin().get("use_ema"):
            raise ValueError(f"{self.file.path}: got no EMA weights, but use_ema is set. Convert again with --use-ema")

    def _updates(self, state: Mapping[str, Tensor]) -> Updates:
        if not self.adapters:
            return {}
        if self.file.kind == QUANTIZED:
            paths = listed([str(adapter.path) for adapter in self.adapters])
            raise ValueError(
                f"{self.file.path}: got quantized weights with the adapters {paths}, expected none: merge them first "
                "(python -m export.convert --lora), then quantize the result"
            )
        merged_before = {lora["sha256"]: lora["file"] for lora in self.origin().get("lora", ())}
        for adapter in self.adapters if merged_before else ():
            if adapter.path.is_file() and sha256(adapter.path) in merged_before:
                raise ValueError(f"{adapter.path}: is already merged into {self.file.path}; remove it from `lora`")
        return read_adapters(self.adapters, {name: tensor.shape for name, tensor in state.items()})


@torch.no_grad()
def materialize(
    model: nn.Module, tensors: Iterable[tuple[str, Tensor]], device: torch.device | str, dtype: torch.dtype
) -> None:
    """Allocate the tensors of a model on the meta device and copy its weights one by one. Buffers keep their dtypes."""
    for module in model.modules():
        # Allocate all before copying any: temporary allocations in between would fragment the heap.
        for key, old in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(torch.empty_like(old, dtype=dtype, device=device), old.requires_grad))
        for key, buffer in list(module.named_buffers(recurse=False)):
            constant = key in module._non_persistent_buffers_set
            setattr(module, key, buffer.to(device) if constant else torch.empty_like(buffer, device=device))
    own = model.state_dict()
    for name, tensor in tensors:
        own.pop(name).copy_(tensor)
    assert not own, f"no weights for {sorted(own)}"


def strip_wrapper_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LongLive's generator tensors under the names of the DiT: without `model.` and prefixes of training wrappers."""
    names: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        plain = plain.removeprefix("model.")
        names[name if plain in names else plain] = tensor
    return names


def state_dict_mismatches(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], shown: Mapping[str, str]
) -> list[str]:
    """Messages about tensors of `state` that do not fit the model's state `own`. `shown`: names to show instead of
    ours. Long lists are shortened."""
    missing = [f"missing {shown.get(name, name)}" for name in sorted(own.keys() - state.keys())]
    unexpected = [f"unexpected {name}" for name in sorted(state.keys() - own.keys())]
    others = []
    for name in sorted(own.keys() & state.keys()):
        got, expected = state[name], own[name]
        if got.shape != expected.shape:
            others.append(f"{shown.get(name, name)}: got {list(got.shape)}, expected {list(expected.shape)}")
        elif expected.is_floating_point() and not got.is_floating_point():
            others.append(f"{shown.get(name, name)}: got {got.dtype}, expected a float dtype")
    return [listed(kind, "\n  ") for kind in (missing, unexpected, others) if kind]


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], source: Path | str) -> None:
    """Copy `state` into `model`. Raises ValueError that lists all mismatches."""
    if errors := state_dict_mismatches(state, model.state_dict(), {}):
        raise ValueError(_mismatch_message(source, errors))
    model.load_state_dict(state)


def _mismatch_message(source: Path | str, errors: Sequence[str]) -> str:
    return f"{source}: does not fit the model:\n  " + "\n  ".join(errors)
