# SPDX-License-Identifier: Apache-2.0
"""Roll-outs for training the DiT: it continues its own frames; the targets are drawn continuations.

Used by `train_rollouts`. After minutes, a video contains the model's own errors, which clean clips never show. Here a
batch of sessions is generated like in the server's model runner (window, sink, recache, four denoising steps). The
world is synthetic, so the target is known at every chunk boundary: the shape's position is read off the session's last
frames, and the continuation is drawn from there.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longlive_serve.backends.base import PromptKV
from longlive_serve.models.dit.causal_dit import CacheView, CausalDiT
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCachePlan, Window
from longlive_serve.models.dit.rope import RotaryTables, rotate
from training.latents import FRAMES, Encoder
from training.pool import CHUNK
from training.world import BACKGROUNDS, MOTIONS, SIZE, SPEED, Attributes, Segment, coverage, draw

FRAMES_PER_CHUNK = FRAMES * CHUNK
MIDDLE = (SIZE / 2, SIZE / 2)


class TrainingCache:
    """Keys and values by layer and block, with their autograd graphs."""

    def __init__(self, layers: int, num_blocks: int) -> None:
        self.keys = [[torch.empty(0)] * num_blocks for _ in range(layers)]
        self.values = [[torch.empty(0)] * num_blocks for _ in range(layers)]

    def detach(self) -> None:
        """Detach all rows: gradients reach back only to the latest KV-cache update or recache."""
        for rows in (*self.keys, *self.values):
            rows[:] = [row.detach() for row in rows]


class TrainingCacheView(CacheView):
    """The view of a `TrainingCache` for one forward of a batch of sessions (absolute RoPE)."""

    def __init__(self, cache: TrainingCache, tables: RotaryTables, plan: KVCachePlan) -> None:
        self.cache, self.plan, self.rows = cache, plan, tables.tokens_per_chunk
        self.query_angles = tables.of_chunks(plan.chunks)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        own = slice(self.plan.first_block, self.plan.first_block + len(self.plan.chunks))
        in_use = []
        for rows, new in ((self.cache.keys[layer], rotate(k, *self.query_angles)), (self.cache.values[layer], v)):
            rows[own] = new.split(self.rows, 2)
            in_use.append(torch.cat(rows[: self.plan.num_blocks], 2))
        return in_use[0], in_use[1]


class Rollout:
    """A batch of sessions in lockstep: all are at the same chunk and switch prompts together."""

    def __init__(self, model: CausalDiT, window: Window, tables: RotaryTables, encoder: Encoder) -> None:
        self.model, self.window, self.tables, self.encoder = model, window, tables, encoder
        self.schedule = FlowMatchScheduler()
        self.cache = TrainingCache(model.config.num_layers, window.capacity)
        self.context_latents: deque[Tensor] = deque(maxlen=window.capacity)
        self.attributes: list[Attributes] = []
        self.chunk = 0

    def begin(self, attributes: Sequence[Attributes]) -> None:
        """Start new videos."""
        self.attributes, self.chunk = list(attributes), 0
        self.context_latents.clear()

    @torch.no_grad()
    def join(self, attributes: Sequence[Attributes], prompt_kv: PromptKV, chunk: int, generator: random.Random) -> None:
        """Start videos at `chunk`, with drawn context chunks. The next `advance` must be a prompt switch.

        `prompt_kv`: of the first prompt, for the sink.
        """
        self.begin(attributes)
        self.context_latents.append(self._stack(self._first_chunk(look) for look in attributes))
        self._update_kv_cache(prompt_kv, self.window.step(0))
        kept = min(chunk, self.window.capacity)
        if chunk > self.window.capacity:
            starts = [(generator.randrange(SIZE), generator.randrange(SIZE)) for _ in attributes]
            first = [self._next_chunk(*pair) for pair in zip(attributes, starts, strict=True)]
            self.context_latents[0] = self._stack(first)
        self.chunk = 1
        while self.chunk < kept:
            self.context_latents.append(self.targets(self.attributes))
            self.chunk += 1
        self.chunk = chunk

    def advance(self, attributes: Sequence[Attributes], prompt_kv: PromptKV, switch: bool, keep_sink: bool) -> Tensor:
        """Generate every session's next chunk under `attributes`, like the model runner. Returns the loss.

        The loss is the mean square error of the flow to the drawn continuation, over the four steps.
        """
        targets = self.targets(attributes)
        if switch:
            self._recache(prompt_kv, keep_sink)
        elif self.chunk:
            self._update_kv_cache(prompt_kv, self.window.step(self.chunk - 1))
        view = TrainingCacheView(self.cache, self.tables, self.window.step(self.chunk))
        x, losses = torch.randn(targets.shape), []
        for step in range(self.schedule.steps):
            flow = self.model(x, self.schedule.timesteps[step].expand(x.shape[:2]), prompt_kv, view)
            losses.append((flow - (x - targets) / self.schedule.sigmas[step]).square().mean())
            clean = self.schedule.convert_flow_pred_to_x0(x, flow.detach(), step)
            if step + 1 < self.schedule.steps:
                x = self.schedule.add_noise(clean, torch.randn(x.shape), step + 1)
        self.context_latents.append(clean)
        self.attributes = list(attributes)
        self.chunk += 1
        return torch.stack(losses).mean()

    @torch.no_grad()
    def targets(self, attributes: Sequence[Attributes]) -> Tensor:
        """The target latents of the next chunk: [sessions, CHUNK, channels, h, w]."""
        if self.chunk == 0:
            return self._stack(self._first_chunk(look) for look in attributes)
        last = self.encoder.decode(self.context_latents[-1][:, -1])  # [B, FRAMES, 3, SIZE, SIZE]
        starts = (locate_shape(frames, look) for frames, look in zip(last, self.attributes, strict=True))
        return self._stack(self._next_chunk(*pair) for pair in zip(attributes, starts, strict=True))

    def _first_chunk(self, look: Attributes) -> Tensor:
        return self.encoder(draw([Segment(attributes=look, frames=1 + FRAMES * (CHUNK - 1))]))

    def _next_chunk(self, look: Attributes, start: tuple[float, float]) -> Tensor:
        """`start`: the shape's position in the previous frame."""
        return self.encoder(draw([Segment(attributes=look, frames=1 + FRAMES_PER_CHUNK)], start))[1:]

    def _stack(self, latents: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(latents))

    def _update_kv_cache(self, prompt_kv: PromptKV, plan: KVCachePlan) -> None:
        latents = self.context_latents[-1]
        view = TrainingCacheView(self.cache, self.tables, plan)
        self.model(latents, torch.zeros(latents.shape[:2]), prompt_kv, view, update_kv_cache=True)

    def _recache(self, prompt_kv: PromptKV, keep_sink: bool) -> None:
        plan = self.window.recache(self.chunk, keep_sink)
        oldest = self.chunk - len(self.context_latents)
        latents = torch.cat([self.context_latents[chunk - oldest] for chunk in plan.chunks], 1)
        view = TrainingCacheView(self.cache, self.tables, plan)
        self.model(latents, torch.zeros(latents.shape[:2]), prompt_kv, view, update_kv_cache=True)


def locate_shape(frames: Tensor, look: Attributes) -> tuple[float, float]:
    """The shape's position in the last of `frames` [n, 3, SIZE, SIZE], to a whole pixel.

    Cross-correlates all frames with the ideal shape along its motion, on the torus; robust to noise and deformation.
    """
    ground = torch.tensor(BACKGROUNDS[look.background])[:, None, None]
    seen = (frames - ground).norm(dim=1).clamp(max=1.0)
    back = torch.arange(len(frames) - 1, -1, -1.0)[:, None] * torch.tensor(MOTIONS[look.motion]) * SPEED
    ideal = coverage(look.shape, (torch.tensor(MIDDLE) - back) % SIZE)
    fit = torch.fft.irfft2(torch.fft.rfft2(seen) * torch.fft.rfft2(ideal).conj(), s=(SIZE, SIZE)).sum(0)
    row, column = divmod(int(fit.argmax()), SIZE)
    return (MIDDLE[0] + column) % SIZE, (MIDDLE[1] + row) % SIZE
