# SPDX-License-Identifier: Apache-2.0
"""Quality measures of the demo model: attributes, prompt switches, drift, and the decoder's PSNR.

Used by `quality`. The server's model runner generates the videos: streamed decode, KV cache, recache.
"""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from longlive_serve.backends.torch_backend import TorchVAEDecoder
from longlive_serve.config.presets import PRESETS, VAE_DECODER
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.protocol.session_options import CLEAR, KEEP, RECACHE
from longlive_serve.weights.loader import load_model
from training.latents import HELD_OUT, Encoder, random_attributes
from training.quality.reader import read
from training.quality.workers import Script, Workers, video
from training.world import ALL, Attributes, Segment, caption, draw

SWITCH_AT = 5  # chunks: the window is full, so the sink is the old prompt's
CHUNKS_30S, CHUNKS_240S = 40, 321  # 477 and 3849 frames
STEADY = 24  # frames before a switch to compare the seam with


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityCase:
    """A video and its expected attributes."""

    script: Script
    attributes: Attributes
    before: Attributes | None = None
    """With a switch: the attributes before chunk SWITCH_AT."""


def held_out_captions(count: int, seed: int) -> list[QualityCase]:
    """New wordings and noise; up to a quarter are held-out combinations."""
    generator = random.Random(seed)
    requested = generator.sample(sorted(HELD_OUT, key=str), min(count // 4, len(HELD_OUT)))
    requested += generator.sample([look for look in ALL if look not in HELD_OUT], count - len(requested))
    return [
        QualityCase(script=Script(prompts={0: caption(look, generator)}, seed=seed * 1000 + number), attributes=look)
        for number, look in enumerate(requested)
    ]


def switches(count: int, seed: int, on_switch: str) -> list[QualityCase]:
    """Random pairs of combinations, including held-out ones."""
    generator = random.Random(seed)
    cases = []
    for number in range(count):
        before, after = generator.sample(ALL, 2)
        prompts = {0: caption(before, generator), SWITCH_AT: caption(after, generator)}
        script = Script(prompts=prompts, seed=seed * 1000 + number, on_switch=on_switch)
        cases.append(QualityCase(script=script, attributes=after, before=before))
    return cases


def early_and_late(runner: ModelRunner, case: QualityCase) -> dict[str, dict[str, bool]]:
    chunks = video(runner, case.script, 10)
    windows = {"chunks_1_2": chunks[1:3], "chunks_8_9": chunks[8:10]}
    return {name: read(torch.cat(window)).agrees(case.attributes) for name, window in windows.items()}


def after_30s(runner: ModelRunner, case: QualityCase) -> bool:
    """Whether all attributes are right in the two chunks that end at 30 s."""
    chunks = video(runner, case.script, CHUNKS_30S)
    return all(read(torch.cat(chunks[-2:])).agrees(case.attributes).values())


def through_240s(runner: ModelRunner, case: QualityCase) -> list[bool]:
    """Whether all attributes are right, for every two chunks (1.5 s) of a session of 240 s."""
    chunks = video(runner, case.script, CHUNKS_240S)
    windows = [torch.cat(chunks[first : first + 2]) for first in range(1, CHUNKS_240S, 2)]
    return [all(read(window).agrees(case.attributes).values()) for window in windows]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchResult:
    """The effect of a prompt switch."""

    at_once: list[bool]
    """For each attribute that the prompt changes: whether it is right in the first chunk under it."""
    changed: list[bool]
    """The same in the second chunk."""
    kept: list[bool]
    """For each other attribute: whether it is right in the second chunk."""
    seam: float | None
    """The largest mean difference of frames in the first 4 after the switch, of 255; None if the background changed."""
    steady: float
    """The median of those differences over the frames before the switch."""


def after_switch(runner: ModelRunner, case: QualityCase) -> SwitchResult:
    before, after = case.before, case.attributes
    assert before is not None
    chunks = video(runner, case.script, SWITCH_AT + 2)
    same = [name for name in vars(after) if getattr(before, name) == getattr(after, name)]
    first, second = (read(chunk).agrees(after) for chunk in chunks[SWITCH_AT:])
    last = torch.cat(chunks[:SWITCH_AT])[-STEADY - 1 :]
    differences = torch.cat([last, chunks[SWITCH_AT][:4]]).float().diff(dim=0).abs().mean((1, 2, 3))
    same_ground = before.background == after.background
    return SwitchResult(
        at_once=[correct for name, correct in first.items() if name not in same],
        changed=[correct for name, correct in second.items() if name not in same],
        kept=[second[name] for name in same],
        seam=differences[STEADY:].max().item() if same_ground else None,
        steady=differences[:STEADY].median().item(),
    )


def attribute_accuracy(workers: Workers, count: int) -> dict[str, float]:
    """Share of captions with right attributes, each and all of them, early and late in the video."""
    right: dict[str, list[bool]] = {}
    cases = held_out_captions(count, seed=0)
    for case, windows in zip(cases, workers.map("captions", early_and_late, cases), strict=True):
        for window, agrees in windows.items():
            right.setdefault(window, []).append(all(agrees.values()))
            if case.attributes in HELD_OUT:
                right.setdefault(f"{window}_held_out_combinations", []).append(all(agrees.values()))
            for name, correct in agrees.items():
                right.setdefault(f"{window}_{name}", []).append(correct)
    return {name: fmean(values) for name, values in right.items()}


def switching(workers: Workers, count: int, on_switch: str) -> dict[str, float | None]:
    """Results of one `on_switch` mode over random pairs of prompts. flicker is None without a common background."""
    results = workers.map(f"switches, {on_switch}", after_switch, switches(count, 1, on_switch))
    seams = [(result.seam, result.steady) for result in results if result.seam is not None]
    return {
        "adoption_first_chunk": fmean([correct for result in results for correct in result.at_once]),
        "adoption": fmean([correct for result in results for correct in result.changed]),
        "kept": fmean([correct for result in results for correct in result.kept]),
        "flicker": fmean([seam for seam, _ in seams]) / fmean([steady for _, steady in seams]) if seams else None,
    }


def ablation(workers: Workers, count: int) -> dict[str, dict[str, float | None]]:
    """Compare the three `on_switch` modes, with the same prompts and noise."""
    return {on_switch: switching(workers, count, on_switch) for on_switch in (RECACHE, KEEP, CLEAR)}


def drift(workers: Workers, short: int, long: int) -> dict[str, Any]:
    """Share of readings with all attributes right after 30 s, and over 240 s; omitted for 0 sessions."""
    found: dict[str, Any] = {}
    if short:
        found["drift_30s_accuracy"] = fmean(workers.map("30 s", after_30s, held_out_captions(short, seed=2)))
    if long:
        readings = workers.map("240 s", through_240s, held_out_captions(long, seed=3))
        by_window = [fmean(window) for window in zip(*readings, strict=True)]
        last = 20  # windows of 1.5 s: the last 30 s
        found["drift_240s_accuracy"] = fmean(by_window[-last:])
        found["drift_by_30s"] = [fmean(by_window[first : first + last]) for first in range(0, len(by_window), last)]
    return found


def vae_psnr(folder: Path, clips: int, seed: int = 4) -> dict[str, float]:
    """Mean PSNR of 33-frame clips that training did not see, decoded as a stream; half are held-out combinations."""
    generator, encoder, config = random.Random(seed), Encoder.fit(), PRESETS["demo"]
    decoder = TorchVAEDecoder(load_model(VAE_DECODER, config, str(folder), "cpu", torch.float32), config)
    psnr: dict[str, list[float]] = {"vae_psnr_db": [], "vae_psnr_db_held_out_combinations": []}
    for number in range(clips):
        held_out = number % 2 == 1
        look = generator.choice(sorted(HELD_OUT, key=str)) if held_out else random_attributes(generator)
        frames = draw([Segment(attributes=look, frames=33)], (generator.randrange(64), generator.randrange(64)))
        with torch.inference_mode():
            decoded, _ = decoder.decode(encoder(frames)[None], decoder.initial_cache(), is_first=True)
        error = (decoded.float().div(255).permute(0, 3, 1, 2) - frames).square().mean()
        psnr["vae_psnr_db"].append(-10 * error.log10().item())
        if held_out:
            psnr["vae_psnr_db_held_out_combinations"].append(psnr["vae_psnr_db"][-1])
    return {name: fmean(values) for name, values in psnr.items()}
