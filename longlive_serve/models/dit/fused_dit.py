# SPDX-License-Identifier: Apache-2.0
"""The causal DiT with few passes over memory: fused kernels, one GEMM for q, k and v, optional FP8 GEMMs and FP8
self-attention.

Used by the fused backend, with B = 1. It takes over the weights of a `CausalDiT`, the reference for its results, and
rounds less often. Shapes: L tokens of the forward, D width, H heads, d head width, T rows of a cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longlive_serve.kernels.attention import attention as attention_with_bias
from longlive_serve.kernels.norms import residual_norm, rms_norm
from longlive_serve.kernels.quantize import QuantizedRows, gelu, quantize_rows
from longlive_serve.kernels.rotary import norm_rotate_write, rotate_keys
from longlive_serve.models.dit.adaln import Modulation
from longlive_serve.models.dit.causal_dit import Angles, Block, CausalDiT

SHORT_PROMPT = 128  # rows kept of a prompt with fewer tokens; longer ones keep all rows: two shapes of CUDA graphs


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptRows:
    """Keys and values of a prompt for cross-attention, with most of the padding rows merged."""

    keys: Tensor
    """[layers, 1, H, rows, d]."""
    values: Tensor
    bias: Tensor | None
    """[rows] float32, added to the logits: one padding row represents several. None: all rows are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheRows:
    """View of the KV cache for one forward."""

    keys: Tensor
    """[layers, H, T, d], written in place. With FP8 attention: FP8, divided by its scales."""
    values: Tensor
    first: int
    """Row of the forward's first token; its other tokens follow."""
    used: int
    """Rows [0, used) are attended to, including the forward's own."""
    query_angles: Angles
    key_angles: Angles | None
    """None: keys are stored rotated, by `query_angles`. Else: stored unrotated and rotated by these in every call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8Attention:
    """Self-attention on FP8 (E4M3) queries, keys and values."""

    attention_fn: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """q [H, L, d], k and v [H, T, d], scales [3] -> FP8 [L, H * d] with the scale of v, over all keys."""
    scales: Tensor
    """Scales of each layer's queries, keys and values: float32 [layers, 3]."""
    out_scales: Tensor
    """Scale of each output token: float32 [layers, max tokens, 1], the layer's scale of the values repeated."""


class Gemm:
    """x [L, in] -> [L, out]: one linear layer, or several with the same input, concatenated."""

    fp8 = False

    def __init__(self, *layers: nn.Linear) -> None:
        self.weight, self.bias = _take(layers)

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        assert isinstance(x, Tensor)
        return F.linear(x, self.weight, self.bias)


class FP8Gemm:
    """`Gemm` in FP8 (E4M3), with one scale per token and one per output channel."""

    fp8 = True

    def __init__(self, *layers: nn.Linear) -> None:
        weight, self.bias = _take(layers)
        quantized = quantize_rows(weight)
        self.weight, self.scales = quantized.values.t(), quantized.scales.t()

    def __call__(self, x: Tensor | QuantizedRows) -> Tensor:
        assert isinstance(x, QuantizedRows)
        return torch._scaled_mm(
            x.values,
            self.weight,
            scale_a=x.scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,  # Hopper's accumulator; row-wise scales support no other
        )


def _take(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor]:
    """Concatenate the layers' weights and biases, and remove them from the layers to free the memory."""
    parts = [(layer.weight, layer.bias) for layer in layers]
    for layer in layers:
        layer.weight = layer.bias = None  # type: ignore[assignment]
    weights, biases = zip(*parts, strict=True)
    return (weights[0], biases[0]) if len(parts) == 1 else (torch.cat(weights), torch.cat(biases))


class FusedBlock:
    """The weights of a block in the layout of the kernels."""

    def __init__(self, block: Block, product: type[Gemm] | type[FP8Gemm]) -> None:
        own, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        self.own, self.cross, self.norm3 = own, cross, block.norm3
        self.qkv, self.o = product(own.q, own.k, own.v), product(own.o)
        self.cross_q, self.cross_o = product(cross.q), product(cross.o)
        self.ffn_in, self.ffn_out = product(ffn[0]), product(ffn[2])  # type: ignore[arg-type]


class FusedCausalDiT:
    """`CausalDiT` for one video. Takes over most of the model's weights: the model cannot run afterwards."""

    def __init__(
        self,
        model: CausalDiT,
        fp8: bool,
        attention_fn: Callable[[Tensor, Tensor, Tensor], Tensor],
        fp8_attention: FP8Attention | None = None,
    ) -> None:
        """fp8: the blocks' GEMMs are FP8, except the prompt's keys and values, which are computed once per prompt.

        attention_fn: q [1, H, L, d], k and v [1, H, T, d] -> [1, H, L, d], over all keys. fp8_attention: replaces it
        for attention to the cache; requires `fp8`.
        """
        assert fp8 or fp8_attention is None, "FP8 attention needs FP8 GEMMs: its output is FP8"
        self.model, self.attention_fn, self.fp8_attention = model, attention_fn, fp8_attention
        self.config, self.eps = model.config, model.config.eps
        self.blocks = [FusedBlock(block, FP8Gemm if fp8 else Gemm) for block in model.blocks]

    def embed_prompt(self, text: Tensor, tokens: int) -> PromptRows:
        """Text encoder output [1, text_len, text_dim], zero after `tokens` rows -> input of cross-attention.

        All padding rows are equal, so a few of them with a larger weight replace all (docs/semantics.md, section 2.1,
        step 5): fewer keys, the same result.
        """
        total = text.shape[1]
        rows = SHORT_PROMPT if tokens < SHORT_PROMPT < total else total
        keys, values = self.model.embed_prompt(text[:, :rows])
        if rows == total:
            return PromptRows(keys=keys, values=values, bias=None)
        bias = torch.zeros(rows, device=text.device)
        bias[tokens:] = math.log((total - tokens) / (rows - tokens))
        return PromptRows(keys=keys, values=values, bias=bias)

    def run(
        self,
        latents: Tensor,
        modulation: Modulation,
        prompt: PromptRows,
        cache: CacheRows,
        update_kv_cache: bool = False,
    ) -> Tensor | None:
        """One forward of whole chunks, latents [1, F, channels, h, w]. Returns the flow, shaped like latents.

        With `update_kv_cache` it returns None: the last block stops after its keys and values.
        """
        x = self.model._patchify(latents)[0]
        update, gate = None, None
        for layer, block in enumerate(self.blocks):
            shift, scale, own_gate, ffn_shift, ffn_scale, ffn_gate = modulation.blocks[layer].unbind()
            z = residual_norm(x, update, gate, scale, shift, eps=self.eps, one_plus=True, fp8=block.qkv.fp8)
            q = self._write_kv(block, layer, z, cache)
            if update_kv_cache and layer == len(self.blocks) - 1:
                return None
            update = self._attend_to_cache(block, layer, q, cache)
            norm = block.norm3
            y = residual_norm(
                x, update, own_gate, norm.weight, norm.bias, eps=self.eps, one_plus=False, fp8=block.cross_q.fp8
            )
            update = self._attend_to_prompt(block, layer, y, prompt)
            z = residual_norm(x, update, None, ffn_scale, ffn_shift, eps=self.eps, one_plus=True, fp8=block.ffn_in.fp8)
            update, gate = block.ffn_out(gelu(block.ffn_in(z), fp8=block.ffn_out.fp8)), ffn_gate
        shift, scale = modulation.head.unbind()
        z = residual_norm(x, update, gate, scale, shift, eps=self.eps, one_plus=True)
        assert isinstance(z, Tensor)
        return self.model._unpatchify(self.model.head.head(z)[None], latents.shape)

    def _write_kv(self, block: FusedBlock, layer: int, z: Tensor | QuantizedRows, cache: CacheRows) -> Tensor:
        """Write keys and values to the cache; return the rotated queries [H, L, d]."""
        qkv, own = block.qkv(z), block.own
        heads = len(qkv), self.config.num_heads, self.config.head_dim
        q = torch.empty(heads, dtype=cache.keys.dtype, device=qkv.device).transpose(0, 1)
        norm_rotate_write(
            qkv, own.norm_q.weight, own.norm_k.weight, *cache.query_angles, q, cache.keys[layer], cache.values[layer],
            first_row=cache.first, eps=self.eps, rotate_keys=cache.key_angles is None,
            scales=self.fp8_attention.scales[layer] if self.fp8_attention else None,
        )  # fmt: skip
        return q

    def _attend_to_cache(self, block: FusedBlock, layer: int, q: Tensor, cache: CacheRows) -> Tensor:
        keys, values = cache.keys[layer, :, : cache.used], cache.values[layer, :, : cache.used]
        if cache.key_angles is not None:
            plain, keys = keys, torch.empty_like(keys)
            rotate_keys(plain, *cache.key_angles, keys)
        if self.fp8_attention is not None:
            scales = self.fp8_attention.scales[layer]
            out = self.fp8_attention.attention_fn(q, keys, values, scales)
            return block.o(QuantizedRows(out, self.fp8_attention.out_scales[layer, : len(out)]))
        return _project(block.o, self.attention_fn(q[None], keys[None], values[None])[0].transpose(0, 1).flatten(1))

    def _attend_to_prompt(self, block: FusedBlock, layer: int, y: Tensor | QuantizedRows, prompt: PromptRows) -> Tensor:
        keys, values = prompt.keys[layer], prompt.values[layer]
        q = rms_norm(block.cross_q(y), block.cross.norm_q.weight, eps=self.eps)
        q = q.unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)
        if prompt.bias is None:
            out = self.attention_fn(q[None], keys, values)[0].transpose(0, 1).flatten(1)
        else:
            out = attention_with_bias(q, keys[0], values[0], key_bias=prompt.bias)
        return _project(block.cross_o, out)


def _project(product: Gemm | FP8Gemm, x: Tensor) -> Tensor:
    return product(quantize_rows(x) if product.fp8 else x)
