# SPDX-License-Identifier: Apache-2.0
"""Backends: models ready to run. `build_backends` is the only place where a backend is chosen."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.backends.start_up import LOAD, note_compilations, phase
from longlive_serve.config.presets import DIT, MODELS, TEXT_ENCODER, TINY, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, TENSORRT, TORCH

if TYPE_CHECKING:
    from longlive_serve.backends.base import Backends, DiTBackend, TextEncoderBackend, VAEDecoderBackend
    from longlive_serve.backends.exported.modules import Graph
    from longlive_serve.config.serve_config import ServeConfig
    from longlive_serve.weights.loader import ModelLoader

    ReadManifest = Callable[[Path], Manifest]

log = logging.getLogger(__name__)


@phase(LOAD)
def build_backends(config: ServeConfig, loader: ModelLoader | None = None) -> Backends:
    """Build the backends that `config` selects; the choice of `auto` and its reason are logged once.

    `loader`: loads PyTorch models; default: from the weights in `config`.
    Raises ValueError for weights, graphs or engines that do not fit the served model or the machine.
    """
    import torch

    from longlive_serve.backends.base import Backends
    from longlive_serve.backends.device import use_device
    from longlive_serve.weights.loader import ModelLoader

    device = config.device
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    use_device(device)
    read_manifest = functools.cache(Manifest.read)
    chosen = choose_backends(config, read_manifest)
    if FUSED in chosen.values():
        _check_triton()
        note_compilations()
    builder = _Builder(config, chosen, device, loader or ModelLoader.from_config(config), read_manifest)
    text_encoder, dit = builder.text_encoder(), builder.dit()
    backends = Backends(
        text_encoder=text_encoder,
        dit=dit,
        vae_decoder=builder.vae_decoder(),
        name="+".join(sorted(set(chosen.values()))),
        device=device,
        dtype=str(dit.dtype).removeprefix("torch."),
    )
    log.info("on %s, %s, preset %s, weights %s", device, backends.dtype, config.preset, config.weights)
    return backends


class _Builder:
    """Loads each model and builds its backend."""

    def __init__(
        self,
        config: ServeConfig,
        chosen: dict[str, str],
        device: str,
        loader: ModelLoader,
        read_manifest: ReadManifest,
    ) -> None:
        self._config, self._chosen, self._device = config, chosen, device
        self._loader, self._read_manifest = loader, read_manifest

    def text_encoder(self) -> TextEncoderBackend:
        from longlive_serve.backends.exported.modules import GraphTextEncoder
        from longlive_serve.backends.torch_backend import TorchTextEncoder

        tokenizer = self._loader.load_tokenizer()
        if self._chosen[TEXT_ENCODER] == TORCH:
            return TorchTextEncoder(self._model(TEXT_ENCODER), tokenizer)
        return GraphTextEncoder(self._graphs(TEXT_ENCODER), tokenizer)

    def dit(self) -> DiTBackend:
        from longlive_serve.backends.exported.modules import GraphDiT
        from longlive_serve.backends.torch_backend import TorchDiT

        config, backend = self._config, self._chosen[DIT]
        options = config.model_config, config.slots, config.variant
        if backend == TORCH:
            return TorchDiT(self._model(DIT), *options)
        if backend == FUSED:
            from longlive_serve.backends.fused.dit import FusedDiT  # needs Triton

            return FusedDiT(self._model(DIT), *options, config.fp8, config.fp8_attention)
        return GraphDiT(self._graphs(DIT), *options)

    def vae_decoder(self) -> VAEDecoderBackend:
        from longlive_serve.backends.exported.modules import GraphVAEDecoder
        from longlive_serve.backends.torch_backend import TorchVAEDecoder

        config, backend = self._config, self._chosen[VAE_DECODER]
        name = TINY_DECODER if config.decoder == TINY else VAE_DECODER
        if backend == TORCH:
            return TorchVAEDecoder(self._model(name), config.model_config)
        if backend == FUSED:
            from longlive_serve.backends.fused.vae import FusedVAEDecoder

            return FusedVAEDecoder(self._model(name), config.model_config, config.fp8_decoder)
        return GraphVAEDecoder(self._graphs(VAE_DECODER))

    def _model(self, name: str) -> Any:
        import torch

        dtype = self._config.dtype
        if dtype == AUTO:
            dtype = "float32" if self._device == "cpu" else "bfloat16"
        return self._loader.load_model(name, self._device, getattr(torch, dtype))

    def _graphs(self, model: str) -> dict[str, Graph]:
        from longlive_serve.backends.exported.graphs import load_graphs

        config, backend = self._config, self._chosen[model]
        manifest = self._read_manifest(_exported_folders(config)[backend])
        manifest.check(backend, config.model_config, config.variant)
        # An empty fingerprint is fine: exported graphs need no checkpoints.
        return load_graphs(model, manifest, self._device, config.dtype, self._loader.fingerprint(model))


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"backend: got {FUSED}, but Triton, which CUDA builds of PyTorch include, is not installed: "
            f'pip install triton, or set backend = "{TORCH}"'
        )


def choose_backends(config: ServeConfig, read_manifest: ReadManifest = Manifest.read) -> dict[str, str]:
    """The backend of every model: the configured one, or with `auto` the first available of engine, graph and torch.

    Raises ValueError for a folder without a valid manifest.
    """
    chosen = {}
    for model in MODELS:
        chosen[model], reason = _choose(model, config, read_manifest)
        log.info("%s: backend %s, %s", model, chosen[model], reason)
    return chosen


def _choose(model: str, config: ServeConfig, read_manifest: ReadManifest) -> tuple[str, str]:
    """A model's backend and the reason for it."""
    backend: str = getattr(config, f"{model}_backend") or config.backend
    reason = "as configured"
    if backend == AUTO:
        backend, reason = TORCH, "as neither `tensorrt_engines` nor `graphs` contains it"
        for candidate, folder in _exported_folders(config).items():
            if _has_graphs(model, folder, read_manifest):
                backend, reason = candidate, f"as {folder} contains it"
    if backend == FUSED and model == TEXT_ENCODER:
        return TORCH, "as there is no fused text encoder"
    if model == VAE_DECODER and config.decoder == TINY and backend != FUSED:
        return TORCH, "as the tiny decoder has no graphs or engines"
    return backend, reason


def _exported_folders(config: ServeConfig) -> dict[str, Path]:
    """The configured folders by backend."""
    folders = {ONNXRUNTIME: config.graphs, TENSORRT: config.tensorrt_engines}
    return {backend: Path(folder) for backend, folder in folders.items() if folder}


def _has_graphs(model: str, folder: Path, read_manifest: ReadManifest) -> bool:
    from longlive_serve.backends.exported.io_spec import GRAPHS_OF

    return set(GRAPHS_OF[model]) <= read_manifest(folder).graphs.keys()
