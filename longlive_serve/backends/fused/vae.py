# SPDX-License-Identifier: Apache-2.0
"""The VAE decoder with fused kernels and CUDA graphs, a whole chunk per pass; the tiny decoder with CUDA graphs.

Built by `build_backends`. Tested against the torch backend; without a GPU its kernels run in Triton's interpreter.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longlive_serve.backends.fused.cuda_graph_runner import CudaGraphs
from longlive_serve.backends.fused.cudnn_convolution import CudnnConvolution
from longlive_serve.backends.fused.cudnn_graphs import NoPlanError
from longlive_serve.backends.start_up import CHOOSE, phase
from longlive_serve.config.presets import ModelConfig
from longlive_serve.kernels.tiles import check_kernels
from longlive_serve.models.quantization.int8_fp8_layers import QuantizedLayer
from longlive_serve.models.vae.decoder import VAEDecoder, to_uint8
from longlive_serve.models.vae.fused_decoder import FusedVAE
from longlive_serve.models.vae.fused_tiny_decoder import FusedTiny
from longlive_serve.models.vae.tiny_decoder import TinyDecoder

PLANS = 32  # cuDNN plans to try per convolution: there are 28 to 37, and the default is 10


class StreamCache(list[Tensor]):
    """The feature cache of one stream. It is stale while the decoder's static cache holds this stream."""

    __slots__ = ("__weakref__",)


class FusedVAEDecoder:
    """The streaming Wan VAE decoder or tiny decoder.

    The CUDA graphs use one static cache. A stream's cache is copied in when the decoder switches to it, and copied back
    when it switches to another: with a single session nothing is copied.
    """

    @torch.no_grad()
    def __init__(self, model: VAEDecoder | TinyDecoder, config: ModelConfig, fp8: bool = False) -> None:
        """Takes over the model's weights. Raises ValueError for a quantized model, or for FP8 if cuDNN lacks it."""
        if any(isinstance(layer, QuantizedLayer) for layer in model.modules()):
            raise ValueError("vae_decoder_backend: got fused with quantized weights, expected plain ones")
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        check_kernels(self.device)
        self.config = config
        convolution = _fp8_convolution() if fp8 else None
        self.model = FusedTiny(model) if isinstance(model, TinyDecoder) else FusedVAE(model, convolution)
        self.graphs = CudaGraphs(self.device)
        self._static_cache = self._new_cache()
        self._owner: weakref.ref[StreamCache] | None = None
        if convolution is not None:
            self._choose_kernels(convolution)

    def initial_cache(self) -> list[Tensor]:
        return StreamCache(self._new_cache())

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        assert isinstance(cache, StreamCache)
        self._swap_in(cache)
        latents = latents.to(self.dtype)
        parts = [latents[:, :1], latents[:, 1:]] if is_first else [latents]
        frames = [self._decode(part, is_first and number == 0) for number, part in enumerate(parts) if part.shape[1]]
        return torch.cat(frames, 1)[0], cache

    def _decode(self, latents: Tensor, is_first: bool) -> Tensor:
        def run(inputs: Sequence[Tensor]) -> Tensor:
            tf32 = torch.backends.cudnn.allow_tf32
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, benchmark_limit=PLANS, allow_tf32=tf32):
                return to_uint8(self.model.decode(inputs[0], self._static_cache, is_first))

        frames = self.graphs((is_first, latents.shape), None, run, [latents])
        assert frames is not None
        return frames

    @phase(CHOOSE)
    def _choose_kernels(self, convolution: CudnnConvolution) -> None:
        """Build plans for all served sizes. The first size, a chunk after the first, selects the kernels for all."""
        config, draw = self.config, torch.Generator(self.device).manual_seed(0)
        size = (1, config.window.chunk, config.vae.z_dim, config.latent_height, config.latent_width)
        latents = torch.randn(size, generator=draw, device=self.device, dtype=self.dtype)
        chunk = config.window.chunk
        try:
            with convolution.record_calls():
                for frames, is_first in ((chunk, False), (1, True), (chunk - 1, False), (1, False)):
                    if frames:
                        self.model.decode(latents[:, :frames], self._static_cache, is_first)
        except NoPlanError as error:
            raise ValueError(f"fp8_decoder: got true on {self.device}: {error}") from None
        self._static_cache = self._new_cache()

    def _swap_in(self, cache: StreamCache) -> None:
        """Copy `cache` to the static cache, and its previous contents back to their owner."""
        owner = None if self._owner is None else self._owner()
        if owner is cache:
            return
        if owner is not None:
            _copy(self._static_cache, owner)
        _copy(cache, self._static_cache)
        self._owner = weakref.ref(cache)

    def _new_cache(self) -> list[Tensor]:
        size = (self.config.latent_height, self.config.latent_width)
        return self.model.initial_cache(*size, self.device, self.dtype)


def _fp8_convolution() -> CudnnConvolution:
    try:
        return CudnnConvolution()
    except (ImportError, RuntimeError) as error:  # the package or the library is missing
        raise ValueError(
            f"fp8_decoder: got true without cuDNN or its frontend ({error}): pip install 'longlive-serve[cudnn]'"
        ) from None


def _copy(source: Iterable[Tensor], target: Iterable[Tensor]) -> None:
    torch._foreach_copy_([*target], [*source])
