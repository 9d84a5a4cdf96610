# SPDX-License-Identifier: Apache-2.0
"""Generates a session's next chunk: prompt switch and recache, four denoising steps, decode, KV-cache update.

Called by the engine core's worker and by replay. It implements docs/semantics.md, sections 5 and 6, and does not know
which backends run the models or which clients watch.
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

WARM_UP_SWITCH = 4  # chunks between prompt switches in the warm-up


class ModelRunner:
    """Advances the sessions of one model, one chunk at a time. Not thread-safe."""

    def __init__(self, backends: Backends, config: ModelConfig, variant: str = "base") -> None:
        self.backends = backends
        self.config = config
        self.window = Window(config.window)
        self.schedule = FlowMatchScheduler(backends.device)
        self.dtype: torch.dtype = getattr(torch, backends.dtype)
        self.asynchronous = backends.device.startswith("cuda")
        """Whether the device runs in parallel to the host; otherwise `collect_output` itself decodes."""
        self.phases: list[Phase] = []
        """Timings of the last collected chunk."""
        self._finished = 0.0
        """When the last chunk was collected (monotonic seconds)."""
        self._update_seconds = 0.0
        """Seconds of KV-cache updates since then, if not `asynchronous`."""
        self._timer = DeviceTimer(backends.device)
        self.max_chunks = MAX_FRAMES // config.window.chunk if variant == "base" else None

    def advance(self, session: Session) -> FrameChunk:
        """Generate the next chunk: `execute_model_async` and `collect_output`."""
        *_, chunk = self.collect_output(self.execute_model_async(session))
        return chunk

    @torch.inference_mode()
    def execute_model_async(self, session: Session, partial_chunks: bool = False) -> InflightChunk:
        """Launch the session's next chunk without waiting for the device. Before it is collected, chunks of other
        sessions may be launched, but not of this one. After an error the session's state is undefined: end it.

        `partial_chunks`: the frames come in parts, one for each latent frame.
        Raises RequestError FRAME_LIMIT when the base variant has no position left for another chunk.
        """
        start_time, number, phases = time.monotonic(), session.next_chunk, session.phases or Phases(self._timer)
        self._check_limit(number)
        with phases.of("switch"):
            if session.context_latents and session.prompt_kv is None:  # loaded from a snapshot
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
        """Wait until only decoding and the KV-cache update of a launched chunk are left."""
        self._timer.wait(chunk.denoised)

    @torch.inference_mode()
    def collect_output(self, chunk: InflightChunk) -> Iterator[FrameChunk]:
        """Yields the parts of the chunk as they are complete, and leaves its timings in `self.phases`.

        If not `asynchronous`, the KV-cache update runs when the caller continues after the last part. A chunk's
        `seconds` begin at its launch, or when the previous chunk was collected if that is later, and include the
        KV-cache updates in between.
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
        """Yields the frames, then runs the KV-cache update, which only the next chunk needs."""
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
        for index, part in enumerate(parts):
            with phases.of("decode"):
                frames, cache = decoder.decode(part, cache, is_first and index == 0)
                session.decoder_cache = cache
                copy = AsyncD2HCopy(frames)
            yield copy

    @phase(WARM_UP)
    def warm_up(self, slots: int | None = None) -> float:
        """Generate a short video before the first session. Returns the mean seconds per chunk.

        It switches prompts often, so that admission by this time allows for switches. `slots`: see `prepare`.
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
        """Do the one-time work (CUDA graphs) of the first `slots` slots (default: all) before their first session."""
        if isinstance(self.backends.dit, Preparable):
            self.backends.dit.prepare(slots)

    def _compile(self) -> None:
        """Run every shape of a session twice: the backend compiles on the first run and captures on the second.

        Covers short and long prompts, recaches of any number of chunks, first and later chunks, whole and in parts.
        """
        for text in 2 * ("a warm-up", "a long one, " * self.config.dit.text_len):
            session = _make_dummy_session(text)
            for number in range(self.window.capacity + 2):
                if number:
                    session.add_prompt(text, NOW)
                list(self.collect_output(self.execute_model_async(session, partial_chunks=number % 2 == 1)))

    def first_frame(self, chunk: int) -> int:
        """Number of a chunk's first video frame: the first latent frame gives 1 video frame, later ones 4 each."""
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
        """Put the next due prompt in force, at most one per chunk; returns a notice for the client."""
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
        """Apply the session's `on_switch` to the KV cache."""
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
        """Store the latents and prompt of chunks written to the sink's blocks, for snapshots."""
        parts = latents.split(self.config.window.chunk, 1)
        for block, (chunk, part) in enumerate(zip(plan.chunks, parts, strict=True), plan.first_block):
            if block < self.window.sink:
                session.sink[block:] = [SinkChunk(chunk=chunk, latents=part, prompt=session.prompt)]

    @torch.inference_mode()
    def restore(self, session: Session) -> None:
        """Rebuild what a snapshot does not hold: keys and values by recache, the decoder cache from the last latents.

        The result is close, not equal: the original keys and values attended to chunks that have left the window.
        """
        num_cached = session.next_chunk - session.first_cached
        if num_cached > self.window.capacity:
            for block, sink in enumerate(session.sink):
                plan = dataclasses.replace(self.window.step(block), chunks=(sink.chunk,))
                prompt_kv = self._embed(session, sink.prompt)[1]
                self._dit(session).update_kv_cache(sink.latents, prompt_kv, session.slot, plan)
        _, session.prompt_kv = self._embed(session, session.prompt)
        if num_cached:
            self._recache(session, keep_sink=True)
        first = session.next_chunk - len(session.context_latents)
        session.decoder_cache = self.backends.vae_decoder.initial_cache()
        for number, latents in enumerate(session.context_latents, first):
            _, session.decoder_cache = self.backends.vae_decoder.decode(latents, session.decoder_cache, number == 0)

    def _denoise(self, session: Session, plan: KVCachePlan, phases: Phases) -> Tensor:
        """Four steps. Returns clean latents [1, frames, channels, h, w]; updates the session, except its KV cache."""
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
        """The chunk's noise in order of use, on the device: one non-blocking copy."""
        draws = session.noise.draw(self._noise_shape, self.schedule.steps)
        return to_device(draws, self.backends.device).to(self.dtype).unbind()

    @property
    def _noise_shape(self) -> tuple[int, ...]:
        config = self.config
        return (1, config.window.chunk, config.dit.channels, config.latent_height, config.latent_width)


def prompt_notice(index: int, encoded: EncodedPrompt) -> str:
    """The notice for prompt `index`: whether it was truncated, and which words the model does not know."""
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
    return Session(id="warm-up", prompt=Prompt(index=0, text=prompt), noise=SeededNoise(0), slot=0)
