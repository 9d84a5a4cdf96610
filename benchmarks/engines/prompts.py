# SPDX-License-Identifier: Apache-2.0
"""Prompts for measurements, and their way into the text encoder without a tokenizer's files.

A token stands for each word, so that a prompt has about as many as it would have. Nothing is cleaned, for which the
server needs ftfy: that these prompts need none is known. The encoder itself runs as it is served, on all positions.
"""

from __future__ import annotations

import zlib

import torch

from longlive_serve.backends.base import EncodedPrompt
from longlive_serve.backends.device import to_device
from longlive_serve.backends.torch_backend import TorchTextEncoder
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.text_encoder import END_ID

FIRST_WORD_ID = 3  # after padding, </s> and the unknown
PROMPTS = (
    "A cinematic medium shot of an old fisherman in a yellow raincoat who mends a torn net on the deck of a small "
    "wooden boat at dawn. Fog drifts over the harbour behind him, gulls circle above the masts, and warm light from a "
    "lantern falls on his hands. He works slowly and with care, looks up for a moment at the sound of a bell, and "
    "smiles. The camera moves gently closer. Natural colours, soft light, shallow depth of field, fine detail.",
    "A cinematic medium shot of an old fisherman in a yellow raincoat on the deck of a small wooden boat at dawn. A "
    "storm comes up: dark clouds roll in over the harbour, rain begins to fall and waves rock the boat. He drops the "
    "net, grips the rail with both hands and shouts to someone on the pier, while the lantern swings wildly above "
    "him. The camera shakes with the waves. Natural colours, hard light, shallow depth of field, fine detail.",
)


class WordEncoder:
    """The torch backend's model behind a tokenizer that knows all words there are and no checkpoints."""

    def __init__(self, backend: TorchTextEncoder, config: ModelConfig) -> None:
        self.model = backend.model
        self.text_len, self.vocabulary = config.dit.text_len, config.text_encoder.vocab_size

    def encode(self, prompt: str) -> EncodedPrompt:
        numbers = [zlib.crc32(word.encode()) for word in prompt.split()][: self.text_len - 1]
        tokens = [*(FIRST_WORD_ID + number % (self.vocabulary - FIRST_WORD_ID) for number in numbers), END_ID]
        padding = self.text_len - len(tokens)
        ids = torch.tensor([tokens + [0] * padding])
        mask = torch.tensor([[1] * len(tokens) + [0] * padding])
        device = next(self.model.parameters()).device
        embeds = self.model(to_device(ids, device), to_device(mask, device))
        return EncodedPrompt(embeds=embeds, tokens=len(tokens), tokens_given=len(tokens))
