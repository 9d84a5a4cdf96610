# SPDX-License-Identifier: Apache-2.0
"""The demo model's tokenizer: one token per word of the captions, in the file format of Hugging Face.

Training writes it beside the weights. The server loads it like umT5's.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from longlive_serve.models.text_encoder import Tokenizer as ServingTokenizer
from training.world import vocabulary

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer with <pad> (0), </s> (1) and <unk> (2). It ignores case and punctuation."""
    words = [PAD, END, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(folder)


def token_batch(tokenizer: ServingTokenizer, captions: Sequence[str], device: str) -> tuple[Tensor, Tensor]:
    """Inputs of the text encoder: ids and mask of the captions, int64 [captions, text_len] each."""
    tokens = [tokenizer(text) for text in captions]
    return torch.cat([token.ids for token in tokens]).to(device), torch.cat([token.mask for token in tokens]).to(device)
