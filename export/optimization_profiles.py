# SPDX-License-Identifier: Apache-2.0
"""The sizes that each graph is called with while serving; TensorRT selects its kernels for exactly these."""

from __future__ import annotations

from longlive_serve.backends.exported.io_spec import BATCH, FRAMES, USED, GraphIO
from longlive_serve.config.presets import WindowConfig
from longlive_serve.models.dit.kv_cache import Window

Sizes = dict[str, tuple[int, int, int]]
"""Named dim -> TensorRT's min, opt and max."""


def profiles_of(io: GraphIO, window: WindowConfig, max_batch: int = 1) -> list[Sizes]:
    """One optimization profile per size that the graph is called with; only the batch varies within one."""
    batch = {BATCH: (1, 1, max_batch)}
    if FRAMES not in io.inputs[0].shape:
        return [batch]
    return [batch | {FRAMES: (frames,) * 3, USED: (used,) * 3} for frames, used in dit_calls(window)]


def dit_calls(window: WindowConfig) -> list[tuple[int, int]]:
    """`Window.call_sizes` in latent frames."""
    return [(chunks * window.chunk, blocks * window.chunk) for chunks, blocks in Window(window).call_sizes()]


def shape(tensor_shape: tuple[int | str, ...], sizes: Sizes, which: int) -> tuple[int, ...]:
    """A tensor's shape at the min (0), opt (1) or max (2) sizes."""
    return tuple(sizes[dim][which] if isinstance(dim, str) else dim for dim in tensor_shape)
