# SPDX-License-Identifier: Apache-2.0
"""Prompts for benchmarks, and a text encoder that needs no tokenizer files.

Each word becomes one token, so a prompt has a realistic length. The prompts need no cleaning, hence no ftfy. The
encoder runs on all positions, as in the server.
"""

from __future__ import annotations

import zlib

import torch

from longlive_serve.backends.base import EncodedPrompt
from longlive_serve.backends.device import to_device
from longlive_serve.backends.torch_backend import TorchTextEncoder
from longlive_serve.config.presets import ModelConfig
from longlive_serve.models.text_encoder import END_ID

FIRST_WORD_ID = 3  # after <pad>, </s> and <unk>
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
    """The torch backend's text encoder with hashed words as token ids."""

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
