# SPDX-License-Identifier: Apache-2.0
"""The exchange of adapters, without a server: who is answered what, and what a backend shares with the one before."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_serve.backends.fused.dit import FusedDiT
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import DIT, PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.lora_manager import LoRAManager
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session_manager import shutting_down
from longlive_serve.models.dit.kv_cache import Window
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.session_options import SET_LORA, Options
from longlive_serve.weights.loader import ModelLoader, load_model
from tests.fakes.service_bench import LIMIT_S, RecordingResponseSender, wait_until
from tests.longlive_serve.live.test_live_adapters import TOKEN, write_adapter

TINY = PRESETS["tiny"]
ASKED = Options(command=SET_LORA, adapters={"style.pt": 1.0}, admin_token=TOKEN)


class At:
    """Adapters of a model runner, whose loading waits for `go`."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
        write_adapter(folder / "style.pt")
        config = ServeConfig(preset="tiny", device="cpu", adapters_dir=str(folder), admin_token=TOKEN)
        self.config = dataclasses.replace(config, **settings)
        self.runner = ModelRunner(build_backends(config), config.model_config)
        self.go, self.woken = threading.Event(), threading.Event()
        self.adapters = LoRAManager(self.runner, self.config, self.woken.set)

        load_now = ModelLoader.load_model

        def load(loader: ModelLoader, name: str, device: str, dtype: torch.dtype) -> Any:
            assert self.go.wait(LIMIT_S)
            return load_now(loader, name, device, dtype)

        monkeypatch.setattr(ModelLoader, "load_model", load)


def test_one_exchange_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, sender, before = At(tmp_path, monkeypatch), RecordingResponseSender(), None
    before = at.runner.backends.dit
    at.adapters.change(ASKED, sender)
    with pytest.raises(RequestError, match="a change is in progress"):
        at.adapters.change(ASKED, RecordingResponseSender())
    at.adapters.apply()
    assert at.runner.backends.dit is before
    at.go.set()
    wait_until(at.woken.is_set)
    at.adapters.apply()
    assert [chunk.notice for chunk in sender.chunks] == ["adapters: style.pt=1"]
    assert at.runner.backends.dit is not before
    at.adapters.change(ASKED, RecordingResponseSender())  # the next one may come


def test_who_waits_when_the_server_goes_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, sender = At(tmp_path, monkeypatch), RecordingResponseSender()
    before = at.runner.backends.dit
    at.adapters.change(ASKED, sender)
    at.adapters.cancel(shutting_down())
    at.adapters.cancel(shutting_down())
    at.go.set()
    wait_until(at.woken.is_set)
    at.adapters.apply()
    assert [error.kind for error in sender.errors] == [RequestError.SHUTTING_DOWN]
    assert at.runner.backends.dit is before


def test_without_a_folder_none_are_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = At(tmp_path, monkeypatch, adapters_dir="", admin_token="")
    with pytest.raises(RequestError, match="have no adapters_dir"):
        at.adapters.change(ASKED, RecordingResponseSender())
    with pytest.raises(ValueError, match="admin_token: got less than 16 characters"):
        ServeConfig(adapters_dir="files")


@pytest.mark.parametrize("kind", [TorchDiT, FusedDiT])
@torch.inference_mode()
def test_engines_of_different_weights_share_the_cache(kind: Any) -> None:
    settings = (TINY, 2, "base", False) if kind is FusedDiT else (TINY, 2, "base")
    model = load_model(DIT, TINY, "random", "cpu", torch.float32)
    other = load_model(DIT, TINY, "random", "cpu", torch.float32)
    other.blocks[0].ffn[0].weight.mul_(1.5)
    first = kind(model, *settings)
    noisy = torch.randn(1, 3, TINY.dit.channels, TINY.latent_height, TINY.latent_width)
    prompt = first.embed_prompt(torch.randn(1, TINY.dit.text_len, TINY.dit.text_dim), TINY.dit.text_len)
    plan = Window(TINY.window).step(0)
    before = first.denoise(noisy, 0, prompt, 0, plan)
    second = first.with_model(other)
    assert second.cache is first.cache
    assert not torch.equal(second.denoise(noisy, 0, prompt, 1, plan), before)
    assert torch.equal(first.denoise(noisy, 0, prompt, 0, plan), before)
