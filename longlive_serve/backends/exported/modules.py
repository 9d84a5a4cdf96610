# SPDX-License-Identifier: Apache-2.0
"""The three models as exported graphs, which take and return tensors by name.

Built by `build_backends` on the graphs of `onnxruntime_session.py` or `tensorrt_session.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from longlive_serve.backends.base import EncodedPrompt, PromptKV
from longlive_serve.backends.device import to_device
from longlive_serve.backends.exported.io_spec import PROMPT_KV, VAE_OPENING, VAE_STEADY, GraphIO, cache_names
from longlive_serve.config.presets import DIT, TEXT_ENCODER, ModelConfig
from longlive_serve.models.dit.causal_dit import PATCH, time_features
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCache, KVCachePlan
from longlive_serve.models.dit.rope import RotaryTables
from longlive_serve.models.text_encoder import Tokenizer
from longlive_serve.models.vae.decoder import to_uint8


class Graph(Protocol):
    """A graph that is ready to run. Belongs to one thread."""

    io: GraphIO
    device: torch.device
    dtype: torch.dtype
    """Dtype of the weights."""

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the graph on contiguous tensors on its device.

        Outputs in `io.in_place` are written over their inputs; the others are returned by name, as new tensors.
        """
        ...


class GraphTextEncoder:
    """umT5 as a graph, and its tokenizer."""

    def __init__(self, graphs: Mapping[str, Graph], tokenizer: Tokenizer) -> None:
        self.graph, self.tokenizer = graphs[TEXT_ENCODER], tokenizer
        self.known_words = tokenizer.known_words()

    def encode(self, prompt: str) -> EncodedPrompt:
        tokens = self.tokenizer(prompt)
        device = self.graph.device
        inputs = {"ids": to_device(tokens.ids, device), "mask": to_device(tokens.mask, device)}
        return EncodedPrompt(
            embeds=self.graph(inputs)["embeds"],
            tokens=tokens.length,
            tokens_given=tokens.full_length,
            unknown=tokens.unknown,
            known=self.known_words,
        )


class GraphDiT:
    """The causal DiT as two graphs, and the KV cache of all slots, which they write in place."""

    def __init__(self, graphs: Mapping[str, Graph], config: ModelConfig, slots: int, variant: str) -> None:
        self.prompt_kv, self.dit = graphs[PROMPT_KV], graphs[DIT]
        self.dtype = self.cache_dtype = self.dit.dtype
        self.relative = variant == "infinity"
        self.chunk, self.tokens_per_frame = config.window.chunk, config.tokens_per_frame
        device, window = self.dit.device, config.window.window
        self.cache = KVCache(config, slots, device, self.dtype)
        self.slots = [self._slot(slot) for slot in range(slots)]
        self.tables = RotaryTables(
            config.dit.head_dim, config.latent_height // PATCH, config.latent_width // PATCH, self.chunk, device
        )
        timesteps = torch.cat([FlowMatchScheduler(device).timesteps, torch.zeros(1, device=device)])
        self.time_features = time_features(timesteps, config.dit.freq_dim).to(self.dtype)
        # Inputs of calls are slices of tensors on the device, so calls copy nothing from the host.
        self.window = torch.zeros(window, device=device)
        self.write_index = torch.arange(0, window, self.chunk, device=device) * self.tokens_per_frame

    def embed_prompt(self, embeds: Tensor, tokens: int) -> PromptKV:
        out = self.prompt_kv({"embeds": embeds.to(self.prompt_kv.dtype)})
        return out["prompt_keys"], out["prompt_values"]

    def denoise(self, noisy: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        return self._run(noisy, step, prompt_kv, slot, plan)

    def update_kv_cache(self, clean: Tensor, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> None:
        self._run(clean, -1, prompt_kv, slot, plan)

    def _slot(self, slot: int) -> dict[str, Tensor]:
        layers = [part[layer] for part in self.cache.slot(slot) for layer in range(len(part))]
        return dict(zip(cache_names(len(layers) // 2), layers, strict=True))

    def _run(self, latents: Tensor, step: int, prompt_kv: PromptKV, slot: int, plan: KVCachePlan) -> Tensor:
        frames = latents.shape[1]
        inputs = {
            "latents": latents.contiguous(),
            "time_features": self.time_features[step].expand(1, frames, -1).contiguous(),
            "prompt_keys": prompt_kv[0],
            "prompt_values": prompt_kv[1],
            "write_index": self.write_index[plan.first_block : plan.first_block + 1],
            **self.slots[slot],
        }
        if self.relative:
            inputs |= self._angles("query", plan.query_positions) | self._angles("key", plan.key_positions)
        else:
            inputs |= self._angles("query", plan.chunks)
            inputs["window"] = self.window[: plan.num_blocks * self.chunk]
        return self.dit(inputs)["flow"]

    def _angles(self, name: str, chunks: tuple[int, ...]) -> dict[str, Tensor]:
        cos, sin = (part.unflatten(0, (1, -1, self.tokens_per_frame)) for part in self.tables.of_chunks(chunks))
        return {f"{name}_cos": cos, f"{name}_sin": sin}


class GraphVAEDecoder:
    """The streaming Wan VAE decoder as two graphs of one latent frame: for the first of a video and for all others."""

    def __init__(self, graphs: Mapping[str, Graph]) -> None:
        self.is_first, self.steady = graphs[VAE_OPENING], graphs[VAE_STEADY]

    def initial_cache(self) -> list[Tensor]:
        graph = self.steady
        shapes = [tensor.shape[1:] for tensor in graph.io.inputs[1:]]
        return [torch.zeros((1, *shape), device=graph.device, dtype=graph.dtype) for shape in shapes]  # type: ignore[arg-type]

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        parts = []
        for index, latent in enumerate(latents.to(self.steady.dtype).unbind(1)):
            graph = self.is_first if is_first and index == 0 else self.steady
            inputs = {f"cache.{number}": tensor for number, tensor in enumerate(cache)}
            out = graph(inputs | {"latent": latent.contiguous()})
            cache = [out[f"new_cache.{number}"] for number in range(len(cache))]
            parts.append(out["video"])
        return to_uint8(torch.cat(parts, 1))[0], cache
