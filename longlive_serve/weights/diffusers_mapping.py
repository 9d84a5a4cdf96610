# SPDX-License-Identifier: Apache-2.0
"""Wan 2.1 in the layout of diffusers (a WanPipeline folder): its files, and the mapping of its tensor names to ours.

Called by `layouts` and `checkpoint`. It only maps names; strict loading checks the result. Source: the state dicts of
diffusers 0.42.1 and transformers 5.23.0, and diffusers' scripts/convert_wan_to_diffusers.py, whose inverse this is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from longlive_serve.config.presets import DIT, TEXT_ENCODER, VAE_DECODER

# Glob of each model's file or shards.
FILES = {
    TEXT_ENCODER: "text_encoder/model*.safetensors",
    DIT: "transformer/diffusion_pytorch_model*.safetensors",
    VAE_DECODER: "vae/diffusion_pytorch_model*.safetensors",
}
TOKENIZER_FOLDER = "tokenizer"

# Pattern that matches a whole module name (or a parameter name without a module) -> our name.
_RULES = {
    TEXT_ENCODER: {  # transformers' names on both sides; the embedding has either of two names
        r"shared": "stack.embed_tokens",
        r"encoder\.(embed_tokens|final_layer_norm|block\..+)": r"stack.\1",
    },
    DIT: {
        r"patch_embedding": "patch_embedding",
        r"condition_embedder\.(text|time)_embedder\.linear_1": r"\1_embedding.0",
        r"condition_embedder\.(text|time)_embedder\.linear_2": r"\1_embedding.2",
        r"condition_embedder\.time_proj": "time_projection.1",
        r"(blocks\.\d+)\.scale_shift_table": r"\1.modulation",
        r"(blocks\.\d+)\.attn1\.(?:to_([qkv])|(norm_[qk]))": r"\1.self_attn.\2\3",
        r"(blocks\.\d+)\.attn1\.to_out\.0": r"\1.self_attn.o",
        r"(blocks\.\d+)\.norm2": r"\1.norm3",  # in execution order; Wan's order is 1, 3, 2
        r"(blocks\.\d+)\.attn2\.(?:to_([qkv])|(norm_[qk]))": r"\1.cross_attn.\2\3",
        r"(blocks\.\d+)\.attn2\.to_out\.0": r"\1.cross_attn.o",
        r"(blocks\.\d+)\.ffn\.net\.0\.proj": r"\1.ffn.0",
        r"(blocks\.\d+)\.ffn\.net\.2": r"\1.ffn.2",
        r"scale_shift_table": "head.modulation",
        r"proj_out": "head.head",
    },
    VAE_DECODER: {  # after `_wan_block_names`
        r"post_quant_conv": "conv2",
        r"decoder\.conv_in": "decoder.conv1",
        r"decoder\.norm_out": "decoder.head.0",
        r"decoder\.conv_out": "decoder.head.2",
        r"(decoder\.middle\.\d+)\.(norm|to_qkv|proj)": r"\1.\2",
        r"(decoder\.upsamples\.\d+)\.(resample\.1|time_conv)": r"\1.\2",
        r"(decoder\.(?:middle|upsamples)\.\d+)\.norm1": r"\1.residual.0",
        r"(decoder\.(?:middle|upsamples)\.\d+)\.conv1": r"\1.residual.2",
        r"(decoder\.(?:middle|upsamples)\.\d+)\.norm2": r"\1.residual.3",
        r"(decoder\.(?:middle|upsamples)\.\d+)\.conv2": r"\1.residual.6",
        r"(decoder\.upsamples\.\d+)\.conv_shortcut": r"\1.shortcut",
    },
}
_VAE_ENCODER = ("encoder.", "quant_conv.")
_PARAMETER = re.compile(r"(.+?)(\.weight|\.bias|\.gamma)?")
_MIDDLE = re.compile(r"decoder\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")
_UPSAMPLES = re.compile(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)")


def is_diffusers(folder: Path) -> bool:
    """Whether the folder has the layout of a WanPipeline: transformer, VAE or umT5 in subfolders."""
    return any(next(folder.glob(pattern), None) is not None for pattern in FILES.values())


def from_diffusers(model: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a WanPipeline model under the names of our `model`, for strict loading.

    `state` must be the whole model: merge shards first. The VAE's encoder is dropped. Names that match no rule are
    unchanged. The tensors are not copied; all shapes are the same.
    """
    if model == VAE_DECODER:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(_VAE_ENCODER)}
    block_names = _wan_block_names(state) if model == VAE_DECODER else {}
    return {_renamed(model, name, block_names.get(name, name)): tensor for name, tensor in state.items()}


def _renamed(model: str, name: str, block_name: str) -> str:
    """Our name of the tensor `name`. `block_name`: its name in the rules."""
    parts = _PARAMETER.fullmatch(block_name)
    assert parts is not None, block_name
    for pattern, ours in _RULES[model].items():
        if match := re.fullmatch(pattern, parts[1]):
            return match.expand(ours) + (parts[2] or "")
    return name


def _wan_block_names(names: Iterable[str]) -> dict[str, str]:
    """Names in the VAE's middle and upsampling stages -> names with the module's index in Wan's single list."""
    stages = [match for name in names if (match := _UPSAMPLES.fullmatch(name))]
    blocks = 1 + max((int(match[3]) for match in stages if match[2] == "resnets"), default=0)  # of each stage
    block_names = {}
    for name in names:
        if match := _MIDDLE.fullmatch(name):  # a residual block, attention, a residual block
            index = 1 if match[1] == "attentions" else 2 * int(match[2])
            block_names[name] = f"decoder.middle.{index}.{match[3]}"
    for match in stages:
        index = int(match[1]) * (blocks + 1) + (int(match[3]) if match[2] == "resnets" else blocks)
        block_names[match[0]] = f"decoder.upsamples.{index}.{match[4]}"
    return block_names
