# SPDX-License-Identifier: Apache-2.0
"""Backends: models ready to run. `build_backends` is the only place where a backend is chosen."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longlive_serve.backends.start_up import LOAD, note_compilations, phase
from longlive_serve.config.presets import DIT, MODELS, TEXT_ENCODER, TINY, TINY_DECODER, VAE_DECODER
from longlive_serve.config.serve_config import AUTO, FUSED, ONNXRUNTIME, TENSORRT, TORCH

if TYPE_CHECKING:
    from longlive_serve.backends.base import Backends, DiTBackend, TextEncoderBackend, VAEDecoderBackend
    from longlive_serve.backends.exported.modules import Graph
    from longlive_serve.config.presets import ModelConfig
    from longlive_serve.config.serve_config import ServeConfig
    from longlive_serve.models.text_encoder import Tokenizer

    Models = Callable[[str], Any]
    """The name of a model -> it, in PyTorch."""
    Graphs = Callable[[str], dict[str, Graph]]
    """The name of a model -> its graphs."""

log = logging.getLogger(__name__)


@phase(LOAD)
def build_backends(config: ServeConfig, load: Callable[..., Any] | None = None) -> Backends:
    """The backends that `config` asks for; what `auto` came to, and why, is logged once.

    `load` gives the PyTorch models, as `weights.load_model` does, which is the default.
    Raises ValueError for weights, graphs or engines that do not fit what is served, or the machine.
    """
    import torch

    from longlive_serve.backends.base import Backends
    from longlive_serve.backends.device import use_device
    from longlive_serve.weights.loader import adapters_of, fingerprint, load_model, load_tokenizer

    sizes, device = config.model_config, config.device
    if device == AUTO:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    use_device(device)
    folders = {ONNXRUNTIME: config.graphs, TENSORRT: config.tensorrt_engines}
    chosen = {model: choose(model, config) for model in MODELS}
    if FUSED in chosen.values():
        _check_triton()
        note_compilations()

    def model(name: str) -> Any:
        dtype = ("float32" if device == "cpu" else "bfloat16") if config.dtype == AUTO else config.dtype
        where = (name, sizes, config.weights, device, getattr(torch, dtype))
        return load(*where) if load else load_model(*where, adapters=adapters, use_ema=config.use_ema)

    def graphs(name: str) -> dict[str, Graph]:
        folder = Path(folders[chosen[name]])
        # None is fine: what has been exported needs no checkpoints.
        weights = fingerprint(name, config.weights, adapters, config.use_ema)
        return open_graphs(name, chosen[name], folder, sizes, config.variant, device, config.dtype, weights)

    adapters = adapters_of(config)
    tokenizer = load_tokenizer(sizes, config.weights)
    text_encoder = _text_encoder(chosen[TEXT_ENCODER], tokenizer, model, graphs)
    dit = _dit(chosen[DIT], config, model, graphs)
    backends = Backends(
        text_encoder=text_encoder,
        dit=dit,
        vae_decoder=_vae_decoder(chosen[VAE_DECODER], config, model, graphs),
        name="+".join(sorted(set(chosen.values()))),
        device=device,
        dtype=str(dit.dtype).removeprefix("torch."),
    )
    log.info("on %s, %s, preset %s, weights %s", device, backends.dtype, sizes.name, config.weights)
    return backends


def _text_encoder(backend: str, tokenizer: Tokenizer, model: Models, graphs: Graphs) -> TextEncoderBackend:
    from longlive_serve.backends.exported.modules import GraphTextEncoder
    from longlive_serve.backends.torch_backend import TorchTextEncoder

    if backend == TORCH:
        return TorchTextEncoder(model(TEXT_ENCODER), tokenizer)
    return GraphTextEncoder(graphs(TEXT_ENCODER), tokenizer)


def _dit(backend: str, config: ServeConfig, model: Models, graphs: Graphs) -> DiTBackend:
    from longlive_serve.backends.exported.modules import GraphDiT
    from longlive_serve.backends.torch_backend import TorchDiT

    where = config.model_config, config.slots, config.variant
    if backend == TORCH:
        return TorchDiT(model(DIT), *where)
    if backend == FUSED:
        from longlive_serve.backends.fused.dit import FusedDiT  # it needs Triton

        return FusedDiT(model(DIT), *where, config.fp8, config.fp8_attention)
    return GraphDiT(graphs(DIT), *where)


def _vae_decoder(backend: str, config: ServeConfig, model: Models, graphs: Graphs) -> VAEDecoderBackend:
    from longlive_serve.backends.exported.modules import GraphVAEDecoder
    from longlive_serve.backends.torch_backend import TorchVAEDecoder

    drawn_by = TINY_DECODER if config.decoder == TINY else VAE_DECODER
    if backend == TORCH:
        return TorchVAEDecoder(model(drawn_by), config.model_config)
    if backend == FUSED:
        from longlive_serve.backends.fused.vae import FusedVAEDecoder

        return FusedVAEDecoder(model(drawn_by), config.model_config, config.fp8_decoder)
    return GraphVAEDecoder(graphs(VAE_DECODER))


def _check_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        raise ValueError(
            f"backend: got {FUSED} without the compiler Triton, which PyTorch for CUDA brings: "
            f'pip install triton, or backend = "{TORCH}"'
        )


def choose(model: str, config: ServeConfig) -> str:
    """The backend of a model: the one asked for, or with `auto` what there is of it: an engine, a graph, else torch."""
    asked: str = getattr(config, f"{model}_backend") or config.backend
    why = "as asked for"
    if asked == AUTO:
        asked, why = TORCH, "as neither `tensorrt_engines` nor `graphs` has it"
        for backend, folder in ((ONNXRUNTIME, config.graphs), (TENSORRT, config.tensorrt_engines)):
            if folder and _has(model, Path(folder)):
                asked, why = backend, f"as {folder} has it"
    if asked == FUSED and model == TEXT_ENCODER:
        asked, why = TORCH, "as there is no fused one"
    if model == VAE_DECODER and config.decoder == TINY and asked != FUSED:
        asked, why = TORCH, "as neither graphs nor engines have the tiny decoder"
    log.info("%s: backend %s, %s", model, asked, why)
    return asked


def _has(model: str, folder: Path) -> bool:
    from longlive_serve.backends.exported.io_spec import GRAPHS_OF
    from longlive_serve.backends.exported.manifest import Manifest

    return set(GRAPHS_OF[model]) <= Manifest.read(folder).graphs.keys()


def open_graphs(
    model: str,
    backend: str,
    folder: Path,
    sizes: ModelConfig,
    variant: str,
    device: str,
    dtype: str = AUTO,
    weights: str = "",
) -> dict[str, Graph]:
    """The graphs of `model` in `folder`, loaded by `backend`.

    `dtype`: the one they must have, if not `auto`; `weights`: the fingerprint of what they must be made of, if any.
    Raises ValueError for a folder of something else.
    """
    from longlive_serve.backends.exported.io_spec import GRAPHS_OF, graph_io
    from longlive_serve.backends.exported.manifest import Manifest

    manifest = Manifest.read(folder)
    manifest.check(folder, backend, sizes, variant)
    table = graph_io(sizes, variant)
    graphs: dict[str, Graph] = {}
    for name in GRAPHS_OF[model]:
        file = manifest.graphs.get(name)
        if file is None or dtype not in (AUTO, file.dtype):
            got = "nothing" if file is None else file.dtype
            raise ValueError(f"{folder}: graph {name}: got {got}, expected it in dtype {dtype!r}. Export it")
        if weights not in ("", file.weights):
            raise ValueError(f"{folder}: graph {name}: was made of other weights than those served. Export it again")
        if backend == ONNXRUNTIME:
            from longlive_serve.backends.exported.onnxruntime_session import OnnxRuntimeGraph

            graphs[name] = OnnxRuntimeGraph(folder, file, table[name], device)
        else:
            from longlive_serve.backends.exported import tensorrt_library

            tensorrt_library.use(file.built["library"])
            from longlive_serve.backends.exported.tensorrt_session import TensorRTGraph

            graphs[name] = TensorRTGraph(folder, file, table[name], device)
    return graphs
