# SPDX-License-Identifier: Apache-2.0
"""Generates a session's next chunk: prompt switch and recache, four denoising steps, decode, KV-cache update.

Called by the engine core's worker and by replay. It knows docs/semantics.md, sections 5 and 6, not who runs
the models and not who watches the video.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longlive_serve.backends.base import Backends, DiTBackend, EncodedPrompt, Preparable, PromptKV
from longlive_serve.backends.device import AsyncD2HCopy, to_device
from longlive_serve.backends.device_timer import DeviceTimer
from longlive_serve.backends.start_up import WARM_UP, phase
from longlive_serve.config.presets import FRAMES_PER_LATENT, ModelConfig
from longlive_serve.engine.inflight import InflightChunk, Phases
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session, SinkChunk
from longlive_serve.models.dit.flow_match_scheduler import FlowMatchScheduler
from longlive_serve.models.dit.kv_cache import KVCachePlan, Window
from longlive_serve.models.dit.rope import MAX_FRAMES
from longlive_serve.observability.tracing import Phase
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import CLEAR, RECACHE

WARM_UP_SWITCH = 4  # chunks


class ModelRunner:
    """Advances sessions of one LongLive, one chunk at a time. Belongs to one thread."""

    def __init__(self, backends: Backends, config: ModelConfig, variant: str = "base") -> None:
        self.backends = backends
        self.config = config
        self.window = Window(config.window)
        self.schedule = FlowMatchScheduler(backends.device)
        self.dtype: torch.dtype = getattr(torch, backends.dtype)
        self.asynchronous = backends.device.startswith("cuda")
        """Whether the device works while the host goes on: else a chunk's frames are there when they are asked for."""
        self.phases: list[Phase] = []
        """Of the last chunk that was finished."""
        self._finished = 0.0
        """When that was."""
        self._update_seconds = 0.0
        """Seconds of KV-cache updates since then, where the host waits for them."""
        self._timer = DeviceTimer(backends.device)
        self.max_chunks = MAX_FRAMES // config.window.chunk if variant == "base" else None

    def advance(self, session: Session) -> FrameChunk:
        """Generate the next chunk: `execute_model_async` and `collect_output`."""
        *_, chunk = self.collect_output(self.execute_model_async(session))
        return chunk

    @torch.inference_mode()
    def execute_model_async(self, session: Session, partial_chunks: bool = False) -> InflightChunk:
        """Give the device the work of the session's next chunk, without waiting for it. Other sessions' chunks may be
        launched before this one is finished, the session's own not. On an error its state is undefined: end it.

        `partial_chunks`: frames come in parts, one for every latent frame.
        Raises RequestError FRAME_LIMIT when the base variant has no position left for another chunk.
        """
        start_time, number, phases = time.monotonic(), session.next_chunk, session.phases or Phases(self._timer)
        self._check_limit(number)
        with phases.of("switch"):
            if session.context_latents and session.prompt_kv is None:  # it comes from a snapshot
                self.restore(session)
            notice = self._apply_prompts(session)
        plan = self.window.step(number, session.first_cached)
        latents = self._denoise(session, plan, phases)
        denoised = self._timer.record()
        parts = latents.split(1, dim=1) if partial_chunks else (latents,)
        frames = self._complete(session, latents, plan, self._decode(session, parts, number == 0, phases))
        return InflightChunk(
            frames=iter([*frames]) if self.asynchronous else frames,
            parts=len(parts),
            first_frame=self.first_frame(number),
            prompt_index=session.prompt.index,
            notice=notice,
            start_time=start_time,
            denoised=denoised,
            phases=phases,
        )

    def wait_until_denoised(self, chunk: InflightChunk) -> None:
        """Until all of a launched chunk is done but its decoding and its KV-cache update."""
        self._timer.wait(chunk.denoised)

    @torch.inference_mode()
    def collect_output(self, chunk: InflightChunk) -> Iterator[FrameChunk]:
        """The chunk's frames as they come, in its parts. What took how long is left in `self.phases`.

        The KV-cache update follows the last part: where the host waits for it, only when the caller asks for more. A
        chunk's `seconds` begin when the one before it was finished, if it was launched before that; KV-cache updates
        since then count.
        """
        first_frame, notice = chunk.first_frame, chunk.notice
        for number, frames in enumerate(chunk.frames, 1):
            part = FrameChunk(
                frames=frames.wait().numpy(), first_frame=first_frame, prompt_index=chunk.prompt_index, notice=notice
            )
            if number == chunk.parts:
                start_time, self._finished = max(chunk.start_time, self._finished), time.monotonic()
                part = dataclasses.replace(part, seconds=self._finished - start_time + self._update_seconds)
                self.phases, self._update_seconds = chunk.phases.until(self._finished), 0.0
            yield part
            first_frame, notice = first_frame + len(part.frames), ""

    def _complete(
        self, session: Session, latents: Tensor, plan: KVCachePlan, frames: Iterator[AsyncD2HCopy]
    ) -> Iterator[AsyncD2HCopy]:
        """The frames, and then the KV-cache update, for which nobody needs to wait: it is for the next chunk."""
        yield from frames
        assert session.prompt_kv is not None
        start_time, session.phases = time.monotonic(), Phases(self._timer)
        with session.phases.of("kv_cache_update"):
            self._dit(session).update_kv_cache(latents, session.prompt_kv, session.slot, plan)
        if not self.asynchronous:
            self._update_seconds += time.monotonic() - start_time

    def _decode(
        self, session: Session, parts: Sequence[Tensor], is_first: bool, phases: Phases
    ) -> Iterator[AsyncD2HCopy]:
        decoder = self.backends.vae_decoder
        cache = decoder.initial_cache() if session.decoder_cache is None else session.decoder_cache
        for place, part in enumerate(parts):
            with phases.of("decode"):
                frames, cache = decoder.decode(part, cache, is_first and place == 0)
                session.decoder_cache = cache
                copy = AsyncD2HCopy(frames)
            yield copy

    @phase(WARM_UP)
    def warm_up(self, slots: int | None = None) -> float:
        """Generate a short video that nobody sees, before the first session. Returns the seconds of a chunk.

        It switches prompts as often as an eager viewer, so that what is promised by that time can be kept. `slots`: as
        `prepare` has it.
        """
        if isinstance(self.backends.dit, Preparable):
            self._compile()
        session, seconds = _make_dummy_session("a warm-up"), []
        for number in range(4 * self.window.capacity):
            if number % WARM_UP_SWITCH == WARM_UP_SWITCH - 1:
                session.add_prompt("another warm-up", NOW)
            seconds.append(self.advance(session).seconds)
        self.prepare(slots)
        return statistics.mean(seconds[self.window.capacity :])

    @torch.inference_mode()
    def prepare(self, slots: int | None = None) -> None:
        """So that the first session in any of the first `slots` (default: all) waits for nothing that is made once."""
        if isinstance(self.backends.dit, Preparable):
            self.backends.dit.prepare(slots)

    def _compile(self) -> None:
        """Whatever a session can ask for, twice: such backends compile when they meet a size, and then capture it.

        Prompts of any length, switches with any number of chunks to recache, first chunks and later
        ones, whole and in parts.
        """
        for text in 2 * ("a warm-up", "a long one, " * self.config.dit.text_len):
            session = _make_dummy_session(text)
            for number in range(self.window.capacity + 2):
                if number:
                    session.add_prompt(text, NOW)
                list(self.collect_output(self.execute_model_async(session, partial_chunks=number % 2 == 1)))

    def first_frame(self, chunk: int) -> int:
        """The number of a chunk's first video frame: the video's first latent frame gives 1 frame, the others 4."""
        latent_frames = chunk * self.config.window.chunk
        return 1 + FRAMES_PER_LATENT * (latent_frames - 1) if latent_frames else 0

    def _check_limit(self, chunk: int) -> None:
        if self.max_chunks is not None and chunk >= self.max_chunks:
            latent_frames = self.max_chunks * self.config.window.chunk
            raise RequestError(
                RequestError.FRAME_LIMIT,
                f"the base variant ends after {latent_frames} latent frames ({self.first_frame(chunk)} video frames): "
                'its RoPE has no position for more. Start a new session, or serve with variant = "infinity"',
            )

    def _apply_prompts(self, session: Session) -> str:
        """Put the next due prompt in force, at most one per chunk; returns what its writer should know."""
        first_latent_frame = session.next_chunk * self.config.window.chunk
        is_due = bool(session.pending) and session.pending[0].at_latent_frame <= first_latent_frame
        if not is_due and session.prompt_kv is not None:
            return ""
        if is_due:
            session.prompt = session.pending.pop(0)
        encoded, session.prompt_kv = self._embed(session, session.prompt)
        if session.next_chunk > 0:
            self._switch_cache(session)
        return prompt_notice(session.prompt.index, encoded)

    def _embed(self, session: Session, prompt: Prompt) -> tuple[EncodedPrompt, PromptKV]:
        encoded = self.backends.text_encoder.encode(prompt.text)
        return encoded, self._dit(session).embed_prompt(encoded.embeds, encoded.tokens)

    def _dit(self, session: Session) -> DiTBackend:
        return session.dit or self.backends.dit

    def _switch_cache(self, session: Session) -> None:
        """Do to the cache what the session's `on_switch` says."""
        if session.on_switch == RECACHE:
            self._recache(session, session.global_sink)
        elif session.on_switch == CLEAR:
            session.first_cached = session.next_chunk

    def _recache(self, session: Session, keep_sink: bool) -> None:
        """Rebuild the cache from recent clean latents under the prompt in force (docs/semantics.md, section 6.1)."""
        plan = self.window.recache(session.next_chunk, keep_sink, session.first_cached)
        first = session.next_chunk - len(session.context_latents)
        latents = torch.cat([session.context_latents[chunk - first] for chunk in plan.chunks], dim=1)
        assert session.prompt_kv is not None
        self._dit(session).update_kv_cache(latents, session.prompt_kv, session.slot, plan)
        self._update_sink(session, latents, plan)

    def _update_sink(self, session: Session, latents: Tensor, plan: KVCachePlan) -> None:
        """Remember what the sink's blocks are given."""
        parts = latents.split(self.config.window.chunk, 1)
        for block, (chunk, part) in enumerate(zip(plan.chunks, parts, strict=True), plan.first_block):
            if block < self.window.sink:
                session.sink[block:] = [SinkChunk(chunk=chunk, latents=part, prompt=session.prompt)]

    @torch.inference_mode()
    def restore(self, session: Session) -> None:
        """Rebuild what a snapshot does not hold: keys and values by recache, the decoder by the last latents.

        Close to what was there before, not equal: keys and values had seen chunks that have left the window since.
        """
        num_cached = session.next_chunk - session.first_cached
        if num_cached > self.window.capacity:
            for block, one in enumerate(session.sink):
                plan = dataclasses.replace(self.window.step(block), chunks=(one.chunk,))
                prompt_kv = self._embed(session, one.prompt)[1]
                self._dit(session).update_kv_cache(one.latents, prompt_kv, session.slot, plan)
        _, session.prompt_kv = self._embed(session, session.prompt)
        if num_cached:
            self._recache(session, keep_sink=True)
        first = session.next_chunk - len(session.context_latents)
        session.decoder_cache = self.backends.vae_decoder.initial_cache()
        for number, latents in enumerate(session.context_latents, first):
            _, session.decoder_cache = self.backends.vae_decoder.decode(latents, session.decoder_cache, number == 0)

    def _denoise(self, session: Session, plan: KVCachePlan, phases: Phases) -> Tensor:
        """Four steps: the chunk's clean latents [1, frames, channels, h, w]. All but its KV-cache update is noted."""
        assert session.prompt_kv is not None
        dit, schedule = self._dit(session), self.schedule
        with phases.of("denoise"):
            x, *noise = self._draw(session)
            for step in range(schedule.steps):
                flow = dit.denoise(x, step, session.prompt_kv, session.slot, plan)
                clean = schedule.convert_flow_pred_to_x0(x, flow, step)
                if step + 1 < schedule.steps:
                    x = schedule.add_noise(clean, noise[step], step + 1)
        self._update_sink(session, clean, plan)
        session.noise.prepare(self._noise_shape, schedule.steps, self.backends.device.startswith("cuda"))
        session.context_latents.append(clean)
        if len(session.context_latents) > self.window.capacity:
            session.context_latents.popleft()
        session.next_chunk += 1
        return clean

    def _draw(self, session: Session) -> Sequence[Tensor]:
        """The chunk's noise in the order of use, brought to the device at once and without waiting for it."""
        draws = session.noise.draw(self._noise_shape, self.schedule.steps)
        return to_device(draws, self.backends.device).to(self.dtype).unbind()

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        config = self.config
        return (1, config.window.chunk, config.dit.channels, config.latent_height, config.latent_width)


def prompt_notice(index: int, encoded: EncodedPrompt) -> str:
    """What the writer of prompt `index` should know: that it was truncated, which words mean nothing to the model."""
    parts = []
    if encoded.tokens_given > encoded.tokens:
        parts.append(
            f"prompt {index} was truncated: it has {encoded.tokens_given} tokens, the first {encoded.tokens} are used"
        )
    if encoded.unknown:
        parts.append(f"prompt {index} has words that this model does not know: {', '.join(encoded.unknown)}")
        if encoded.known:
            parts.append(f"it knows: {', '.join(encoded.known)}")
    return "; ".join(parts)


def _make_dummy_session(prompt: str) -> Session:
    """A session that warms up."""
    return Session(id="warm-up", prompt=Prompt(index=0, text=prompt), noise=SeededNoise(0), slot=0)
