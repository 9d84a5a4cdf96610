# SPDX-License-Identifier: Apache-2.0
"""The demo model's tokenizer: one token per word of the world, in the file format of Hugging Face.

Used by training, which writes it beside the weights. Serving loads it like umT5's own.
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
    """Write a tokenizer that appends </s> (1), pads with 0 and takes words it does not know as <unk> (2).

    Case and punctuation do not matter.
    """
    words = [PAD, END, UNKNOWN, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace()])
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)  # type: ignore[no-untyped-call]
    wrapped.save_pretrained(folder)


def token_batch(tokenizer: ServingTokenizer, captions: Sequence[str], device: str) -> tuple[Tensor, Tensor]:
    """ids and mask of some captions, int64 [captions, text_len] each, as the text encoder takes them."""
    tokens = [tokenizer(text) for text in captions]
    return torch.cat([token.ids for token in tokens]).to(device), torch.cat([token.mask for token in tokens]).to(device)
