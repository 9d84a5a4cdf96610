# SPDX-License-Identifier: Apache-2.0
"""Prompts to embeddings: text cleaning, the tokenizer and the umT5 encoder.

Used by the backends and by the engine, which reports truncated prompts to the client.
"""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from longlive_serve.config.presets import TextEncoderConfig

PAD_ID = 0
END_ID = 1  # </s>, appended to every prompt
BYTE_VOCABULARY = 384  # ids of the tokenizer that needs no files
SMALL_VOCABULARY = 100  # words; a vocabulary of up to this size is listed to the client


def clean_prompt(text: str) -> str:
    """Clean a prompt as the reference does: fix Unicode and HTML entities, collapse whitespace, keep the case."""
    import ftfy  # imported here: running the encoder alone does not need it

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TokenizedPrompt:
    """A prompt as the input of the text encoder."""

    ids: Tensor  # int64 [1, text_len]
    mask: Tensor  # int64 [1, text_len]: 1 for a token, 0 for padding
    length: int  # tokens after truncation, including </s>
    full_length: int  # tokens before truncation, including </s>
    unknown: tuple[str, ...]  # words that have no token


class Tokenizer:
    """Cleans and tokenizes prompts; pads and truncates to `text_len` tokens. The last kept token is always </s>.

    `folder` holds the tokenizer files of google/umt5-xxl; nothing is downloaded. None selects ByT5's tokenizer,
    which needs no files: one token per byte, 384 ids.
    """

    def __init__(self, text_len: int, folder: Path | None) -> None:
        from transformers import AutoTokenizer, ByT5Tokenizer  # takes seconds, so not at import time

        if text_len < 2:
            raise ValueError(f"text_len: got {text_len}, expected 2 or more (a token and </s>)")
        self.text_len = text_len
        try:
            if folder is not None and not folder.is_dir():
                raise NotADirectoryError(folder)  # otherwise transformers looks it up in its download cache
            self._hf = AutoTokenizer.from_pretrained(folder, local_files_only=True) if folder else ByT5Tokenizer()
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: got {folder}, expected the tokenizer folder of google/umt5-xxl") from error
        special = (self._hf.pad_token_id, self._hf.eos_token_id)
        if special != (PAD_ID, END_ID):
            raise ValueError(f"tokenizer in {folder}: got padding and </s> as {special}, expected {(PAD_ID, END_ID)}")

    def __call__(self, text: str) -> TokenizedPrompt:
        text, fast = clean_prompt(text), self._hf.is_fast
        encoding = self._hf(text, add_special_tokens=True, verbose=False, return_offsets_mapping=fast)
        full: list[int] = encoding["input_ids"]
        spans = zip(full, encoding["offset_mapping"], strict=True) if fast else ()
        unknown = tuple(dict.fromkeys(text[slice(*span)] for token, span in spans if token == self._hf.unk_token_id))
        kept = full if len(full) <= self.text_len else [*full[: self.text_len - 1], END_ID]
        ids = torch.full((1, self.text_len), PAD_ID)
        ids[0, : len(kept)] = torch.tensor(kept)
        mask = (torch.arange(self.text_len) < len(kept)).long().unsqueeze(0)
        return TokenizedPrompt(ids=ids, mask=mask, length=len(kept), full_length=len(full), unknown=unknown)

    def known_words(self) -> tuple[str, ...]:
        """All words of the vocabulary, or () if there are more than `SMALL_VOCABULARY`."""
        words = self._hf.get_vocab().keys() - self._hf.all_special_tokens
        return tuple(sorted(words)) if len(words) <= SMALL_VOCABULARY else ()


class TextEncoder(nn.Module):
    """The umT5 encoder of transformers with the sizes in `config`. Parameter names: see `wan_names`."""

    def __init__(self, config: TextEncoderConfig) -> None:
        from transformers import UMT5Config, UMT5EncoderModel  # takes seconds, so not at import time

        super().__init__()
        umt5 = UMT5Config(  # type: ignore[call-arg]  # attn_implementation: a keyword of every config
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
            relative_attention_max_distance=config.max_distance,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
            dropout_rate=0.0,
            attn_implementation="eager",
        )
        # Only the stack: the model around it adds just a second, tied name for the embedding.
        self.stack = UMT5EncoderModel(umt5).get_encoder()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask int64 [B, text_len] -> [B, text_len, dim] in the model's dtype; padding rows are zero."""
        # An additive mask [B, 1, 1, text_len]: transformers reads the values of any other mask, which syncs the GPU.
        dtype = self.stack.embed_tokens.weight.dtype
        masked = (mask[:, None, None] == 0).to(dtype) * torch.finfo(dtype).min
        hidden: Tensor = self.stack(input_ids=ids, attention_mask=masked).last_hidden_state
        return hidden.masked_fill(mask.unsqueeze(-1) == 0, 0.0)


_NAMES = {"token_embedding.weight": "embed_tokens.weight", "norm.weight": "final_layer_norm.weight"}
_NAMES_OF_BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}


def wan_names(num_layers: int) -> dict[str, str]:
    """Map each tensor name in models_t5_umt5-xxl-enc-bf16.pth to its name in `TextEncoder`."""
    names = {wan: f"stack.{ours}" for wan, ours in _NAMES.items()}
    for layer in range(num_layers):
        names |= {f"blocks.{layer}.{wan}": f"stack.block.{layer}.{ours}" for wan, ours in _NAMES_OF_BLOCK.items()}
    return names
