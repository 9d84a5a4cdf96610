# SPDX-License-Identifier: Apache-2.0
"""Errors of a quantized DiT's forwards with the same inputs as the unquantized one: per noise level and per block.

Called by `evaluate`. The model runner follows the unquantized model; the others run on copies of its cache.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean

from torch import Tensor

from longlive_serve.backends.base import PromptKV
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.dit.kv_cache import KVCachePlan
from quantization.calibration import calibration_session


def relative_error(output: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference, relative to the L2 norm of `expected`."""
    return float((output.float() - expected.float()).norm() / expected.float().norm())


class RecordingDiT:
    """A DiT backend that records its blocks' outputs of the last forward."""

    def __init__(self, backend: TorchDiT) -> None:
        self.backend = backend
        self.outputs: list[Tensor] = []
        self.prompt_kv: PromptKV | None = None
        for block in backend.model.blocks:
            block.register_forward_hook(lambda _module, _inputs, output: self.outputs.append(output))

    def denoise(self, noisy: Tensor, step: int, slot: int, plan: KVCachePlan) -> Tensor:
        assert self.prompt_kv is not None
        self.outputs.clear()
        return self.backend.denoise(noisy, step, self.prompt_kv, slot, plan)


class ComparedDiTs:
    """The DiT backend `reference` for one session; `candidates` also run each denoising step.

    `flow[name][step]` collects the relative errors of their flows, `blocks[name][block]` those after each block.
    """

    def __init__(self, reference: TorchDiT, candidates: Mapping[str, TorchDiT]) -> None:
        self.reference, self.dtype, self.cache_dtype = RecordingDiT(reference), reference.dtype, reference.cache_dtype
        self.candidates = {name: RecordingDiT(backend) for name, backend in candidates.items()}
        layers = len(reference.model.blocks)
        self.flow = {name: [list[float]() for _ in reference.timesteps] for name in candidates}
        self.blocks = {name: [list[float]() for _ in range(layers)] for name in candidates}

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        for recorder in (self.reference, *self.candidates.values()):
            recorder.prompt_kv = recorder.backend.embed_prompt(embeds, tokens)
        assert self.reference.prompt_kv is not None
        return self.reference.prompt_kv

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        cache = self.reference.backend.cache
        flow = self.reference.denoise(noisy, step, slot, plan)
        for name, other in self.candidates.items():
            other.backend.cache.keys.copy_(cache.keys)  # the candidate overwrites its current block
            other.backend.cache.values.copy_(cache.values)
            self.flow[name][step].append(relative_error(other.denoise(noisy, step, slot, plan), flow))
            for block, (output, expected) in enumerate(zip(other.outputs, self.reference.outputs, strict=True)):
                self.blocks[name][block].append(relative_error(output, expected))
        return flow

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        self.reference.backend.update_kv_cache(clean, prompt_kv, slot, plan)


def flow_errors(
    config: ServeConfig, folders: Mapping[str, str], prompts: Sequence[str], sessions: int
) -> dict[str, dict[str, list[float]]]:
    """Mean relative L2 errors of the DiTs in `folders` (by recipe) against that of `config`.

    `flow_rel_error_by_step`: of the flow; `rel_error_after_block`: of each block's output;
    `flow_rel_error_of_block_alone`: of the flow with only that block quantized.
    """
    backends = build_backends(config)
    reference, candidates = _torch_dit(backends.dit), {}
    for name, folder in folders.items():
        quantized = _torch_dit(build_backends(dataclasses.replace(config, weights=folder)).dit)
        for block in range(config.model_config.dit.num_layers):
            with_one_block = TorchDiT(
                with_block(reference.model, quantized.model, block), config.model_config, 1, config.variant
            )
            candidates[f"{name} {block}"] = with_one_block
        candidates[name] = quantized
    compared = ComparedDiTs(reference, candidates)
    runner = ModelRunner(dataclasses.replace(backends, dit=compared), config.model_config, config.variant)
    for number in range(sessions):
        calibration_session(runner, list(prompts), number)
    blocks = range(config.model_config.dit.num_layers)
    return {
        name: {
            "flow_rel_error_by_step": [fmean(errors) for errors in compared.flow[name]],
            "rel_error_after_block": [fmean(errors) for errors in compared.blocks[name]],
            "flow_rel_error_of_block_alone": [
                fmean([fmean(step) for step in compared.flow[f"{name} {block}"]]) for block in blocks
            ],
        }
        for name in folders
    }


def with_block(model: CausalDiT, quantized: CausalDiT, block: int) -> CausalDiT:
    """A copy of `model` with one block of `quantized`."""
    mixed = copy.deepcopy(model)
    mixed.set_submodule(f"blocks.{block}", copy.deepcopy(quantized.blocks[block]))
    return mixed


def _torch_dit(backend: object) -> TorchDiT:
    assert isinstance(backend, TorchDiT)
    return backend
