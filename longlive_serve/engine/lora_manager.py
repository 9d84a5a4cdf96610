# SPDX-License-Identifier: Apache-2.0
"""Changes the LoRA adapters of new sessions while others are live.

Used by the engine core's worker. A separate thread merges the weights; the worker installs the result between two
chunks. A session keeps the DiT that it started with, which is freed with its last session.
"""

from __future__ import annotations

import dataclasses
import hmac
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from longlive_serve.backends.base import Exchangeable
from longlive_serve.config.presets import DIT
from longlive_serve.config.serve_config import Adapter, ServeConfig
from longlive_serve.engine.client_stream import ResponseSender, notice_chunk
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.protocol.errors import RequestError, invalid
from longlive_serve.protocol.session_options import Options
from longlive_serve.weights.loader import ModelLoader

log = logging.getLogger(__name__)


class LoRAManager:
    """The adapters of new sessions: those in the settings, plus those of the last `set_lora` command."""

    def __init__(self, runner: ModelRunner, config: ServeConfig, wake: Callable[[], None]) -> None:
        """`wake` is called from the loader thread when `apply` has work."""
        self._runner, self._config, self._wake = runner, config, wake
        self._pending_sender: ResponseSender | None = None
        """Answers the change in progress; None: there is none."""
        self._loaded: CausalDiT | RequestError | None = None
        self._description = ""

    def change(self, options: Options, sender: ResponseSender) -> None:
        """Start to load adapters; `sender` is answered when they are in use. Raises RequestError to refuse."""
        config, requested, dit = self._config, options.adapters or {}, self._runner.backends.dit
        if not config.adapters_dir:
            raise RequestError(RequestError.FORBIDDEN, "OPTIONS.adapters: the server's settings have no adapters_dir")
        if not hmac.compare_digest(config.admin_token.encode(), (options.admin_token or "").encode()):
            raise RequestError(
                RequestError.FORBIDDEN, "OPTIONS.admin_token: expected the admin_token of the server's settings"
            )
        if not isinstance(dit, Exchangeable):
            text = f"OPTIONS.adapters: got backend {self._runner.backends.name}, expected torch or fused for the DiT"
            raise invalid(text)
        if self._pending_sender is not None:
            raise RequestError(RequestError.UNAVAILABLE, "OPTIONS.adapters: a change is in progress; try again in 5 s")
        adapters = [Adapter(path=self._file(name), scale=float(scale)) for name, scale in requested.items()]
        scales = [f"{name}={scale:g}" for name, scale in requested.items()]
        self._description = ", ".join(scales) or "only those in the settings"
        self._pending_sender = sender
        threading.Thread(target=self._load, args=(adapters, dit.dtype), name="longlive-adapters", daemon=True).start()

    def apply(self) -> None:
        """Install the loaded adapters, if there are any, and answer."""
        sender, loaded = self._pending_sender, self._loaded
        if loaded is None or sender is None:
            return
        self._pending_sender = self._loaded = None
        if isinstance(loaded, RequestError):
            sender.fail(loaded)
            return
        backends = self._runner.backends
        assert isinstance(backends.dit, Exchangeable)
        self._runner.backends = dataclasses.replace(backends, dit=backends.dit.with_model(loaded))
        log.info("adapters of new sessions: %s", self._description)
        sender.send(notice_chunk(self._config.model_config.video_size, f"adapters: {self._description}"), final=True)

    def cancel(self, error: RequestError) -> None:
        """Answer the open request with `error`; the adapters being loaded are not used."""
        if self._pending_sender is not None:
            self._pending_sender.fail(error)
            self._pending_sender = None

    def _file(self, name: str) -> Path:
        folder = Path(self._config.adapters_dir)
        # Compare bytes: Triton's embedded Python uses ASCII and cannot encode other names in a path.
        files = {os.fsencode(path.name): path for path in folder.glob("*") if path.is_file()}
        found = files.get(name.encode(errors="replace"))
        if found is None:
            available = sorted(file.decode(errors="replace") for file in files)
            raise invalid(f"OPTIONS.adapters: got {name!r}, expected some of {available}")
        return found

    def _load(self, adapters: list[Adapter], dtype: torch.dtype) -> None:
        """Runs in the loader thread."""
        config, device = self._config, self._runner.backends.device
        try:
            loader = ModelLoader.from_config(config)
            loader = dataclasses.replace(loader, adapters=[*loader.adapters, *adapters])
            self._loaded = loader.load_model(DIT, device, dtype)
        except ValueError as error:
            self._loaded = invalid(str(error))
        except Exception as error:  # the boundary of the thread
            log.exception("adapters failed")
            self._loaded = RequestError(RequestError.INTERNAL, f"{type(error).__name__}: {error}")
        self._wake()
