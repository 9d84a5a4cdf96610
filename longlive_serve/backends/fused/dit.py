# SPDX-License-Identifier: Apache-2.0
"""The causal DiT with fused Triton kernels and CUDA graphs: the fast way to run it on a GPU from PyTorch weights.

Built by `build_backends`. Tested against the torch backend; without a GPU its kernels run in Triton's interpreter.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from longlive_serve.backends.base import PromptKV
from longlive_serve.backends.fused.attention_autotune import select_attention, select_fp8_attention
from longlive_serve.backends.fused.cuda_graph_runner import CudaGraphs, Function
from longlive_serve.config.presets import ModelConfig
from longlive_serve.kernels.tiles import check_kernels
from longlive_serve.models.dit.adaln import Modulation, modulation
from longlive_serve.models.dit.causal_dit import PATCH, CausalDiT
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.fused_dit import CacheRows, FP8Attention, FusedCausalDiT, PromptRows
from longlive_serve.models.dit.kv_cache import KVCache, KVCachePlan
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.quantization.fp8_scale_bounds import attention_scales
from longlive_serve.models.quantization.int8_fp8_layers import QuantizedLayer

KV_CACHE_UPDATE = -1  # the step of a KV-cache update or recache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of a forward, except the slot."""

    latents: Tensor
    step: int
    prompt_kv: PromptKV
    plan: KVCachePlan


class FusedDiT:
    """The causal DiT and the KV cache of all slots. CUDA graphs per slot and call size are captured on demand, or for
    all slots by `prepare`."""

    def __init__(
        self,
        model: CausalDiT,
        config: ModelConfig,
        slots: int,
        variant: str,
        fp8: bool = False,
        fp8_attention: bool = False,
    ) -> None:
        """Takes over the model's weights. Raises ValueError for a quantized model, or for FP8 on an unsuitable GPU."""
        device, self.dtype = model.patch_embedding.weight.device, model.patch_embedding.weight.dtype
        self.relative, self.fp8 = variant == "infinity", fp8
        self.attention_fn = select_attention(config, device, self.dtype)
        self.fp8_attention_fn = select_fp8_attention(config, device) if fp8_attention else None
        self.cache_dtype = torch.float8_e4m3fn if fp8_attention else self.dtype
        self.cache = KVCache(config, slots, device, self.cache_dtype)
        grid = config.latent_height // PATCH, config.latent_width // PATCH
        self.tables = RotaryTables(config.dit.head_dim, *grid, config.window.chunk, device)
        self._calls: dict[Hashable, Call] = {}
        """One call of each size made before `prepare`; kept until all slots are prepared."""
        self._in_warmup = True
        self._take_weights(model)

    def with_model(self, model: CausalDiT) -> FusedDiT:
        """As `Exchangeable.with_model`. Takes over the model's weights."""
        other = copy.copy(self)
        other._calls, other._in_warmup = {}, False
        other._take_weights(model)
        return other

    @torch.no_grad()
    def _take_weights(self, model: CausalDiT) -> None:
        device = model.patch_embedding.weight.device
        check_kernels(device)
        check(model, self.fp8, device, self.dtype)
        timesteps = FlowMatchScheduler(device).timesteps
        levels = [*timesteps, torch.zeros_like(timesteps[0])]
        self.modulations = [modulation(model, level) for level in levels]
        """Of the denoising steps, then of a KV-cache update."""
        attention = None
        if self.fp8_attention_fn is not None:
            scales = attention_scales(model, self.modulations)
            rows = self.cache.keys.shape[-2]  # a recache of the whole window
            out_scales = scales[:, 2].view(-1, 1, 1).repeat(1, rows, 1)
            attention = FP8Attention(attention_fn=self.fp8_attention_fn, scales=scales, out_scales=out_scales)
        self.model = FusedCausalDiT(model, self.fp8, self.attention_fn, attention)
        self.graphs = CudaGraphs(device)

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        prompt = self.model.embed_prompt(embeds.to(self.dtype), tokens)
        return (prompt.keys, prompt.values) if prompt.bias is None else (prompt.keys, prompt.values, prompt.bias)

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        flow = self._run(noisy, step, prompt_kv, slot, plan)
        assert flow is not None
        return flow

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        self._run(clean, KV_CACHE_UPDATE, prompt_kv, slot, plan)

    def prepare(self, slots: int | None = None) -> None:
        """Capture, for every slot, the graphs that any slot has run, so no session waits for a capture."""
        self._in_warmup = False
        for call in self._calls.values():
            for slot in range(self.cache.keys.shape[1] if slots is None else slots):
                self.graphs.prepare(*self._graph(call, slot))
        if slots is None:
            self._calls = {}

    def _run(self, latents: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor | None:
        call = Call(latents=latents, step=step, prompt_kv=prompt_kv, plan=plan)
        graph = self._graph(call, slot)
        if self._in_warmup:
            self._calls.setdefault(graph[0], call)
        return self.graphs(*graph)

    def _graph(self, call: Call, slot: int) -> tuple[Hashable, int, Function, list[Tensor], int]:
        """The arguments of `CudaGraphs` for a forward. Its integers are constants of the graph, all else are inputs."""
        latents, prompt_kv, plan = call.latents, call.prompt_kv, call.plan
        rows, level = self.tables.tokens_per_chunk, self.modulations[call.step]
        first, used = plan.first_block * rows, plan.num_blocks * rows
        order = plan.query_positions if self.relative else plan.chunks
        angles = [*self.tables.of_chunks(order)]
        if self.relative:
            angles += self.tables.of_chunks(plan.key_positions)
        update_kv_cache = call.step == KV_CACHE_UPDATE

        def forward(inputs: Sequence[Tensor]) -> Tensor | None:
            latents, blocks, head, *rest = inputs
            angles, prompt = rest[: -len(prompt_kv)], rest[-len(prompt_kv) :]
            cache = CacheRows(
                keys=self.cache.keys[:, slot],
                values=self.cache.values[:, slot],
                first=first,
                used=used,
                query_angles=(angles[0], angles[1]),
                key_angles=(angles[2], angles[3]) if self.relative else None,
            )
            rows = PromptRows(keys=prompt[0], values=prompt[1], bias=prompt[2] if len(prompt) > 2 else None)
            return self.model.run(
                latents, Modulation(blocks=blocks, head=head), rows, cache, update_kv_cache=update_kv_cache
            )

        key = (update_kv_cache, first, used, latents.shape, prompt_kv[0].shape, len(prompt_kv))
        return key, slot, forward, [latents, level.blocks, level.head, *angles, *prompt_kv], len(prompt_kv)


def check(model: CausalDiT, fp8: bool, device: torch.device, dtype: torch.dtype) -> None:
    if any(isinstance(layer, QuantizedLayer) for layer in model.modules()):
        raise ValueError("dit_backend: got fused with quantized weights, expected plain ones: set `fp8` instead")
    if not fp8:
        return
    config = model.config
    if config.dim % 16 or config.ffn_dim % 16:
        raise ValueError(f"fp8: got dim {config.dim} and ffn_dim {config.ffn_dim}, expected multiples of 16")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9) or dtype != torch.bfloat16:
            here = ".".join(map(str, capability))
            raise ValueError(f"fp8: got {dtype}, compute capability {here}; expected bfloat16 and 8.9 or higher")
