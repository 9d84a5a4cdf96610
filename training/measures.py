# SPDX-License-Identifier: Apache-2.0
"""What the demo network shows, read off its frames: `python -m training.quality FOLDER`.

The videos come out of the serving pipeline itself: streamed decode, KV cache, recache.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from longlive_serve.engines import build_dit
from longlive_serve.engines.interface import Engines
from longlive_serve.engines.torch_engine import TorchTextEncoder, TorchVAEDecoder
from longlive_serve.pipeline import Pipeline
from longlive_serve.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.weights import load_networks
from training.reader import read
from training.train_dit import DEMO
from training.world import ALL, caption, held_out

SHIPPED = Path(__file__).parents[1] / "model_repository/longlive/1/demo"
SWITCH_AT = 5  # chunks


def build_pipeline(folder: Path) -> Pipeline:
    networks = load_networks(DEMO, str(folder), "cpu", torch.float32)
    engines = Engines(
        text_encoder=TorchTextEncoder(networks.text_encoder, networks.tokenizer),
        dit=build_dit("torch", networks.dit, DEMO, 1, "base"),
        vae_decoder=TorchVAEDecoder(networks.vae_decoder, DEMO),
        device="cpu",
        dtype="float32",
    )
    return Pipeline(engines, DEMO, "base")


def video(pipeline: Pipeline, prompts: Sequence[str], chunks: int, seed: int) -> list[Tensor]:
    """Frames of every chunk; the second prompt, if there is one, is sent before chunk SWITCH_AT."""
    session = Session(id="quality", prompt=Prompt(index=0, text=prompts[0]), noise=SeededNoise(seed), slot=0)
    made = []
    for chunk in range(chunks):
        if chunk == SWITCH_AT and len(prompts) > 1:
            session.add_prompt(prompts[1], NOW)
        made.append(torch.from_numpy(pipeline.advance(session).frames))
    return made


def attribute_accuracy(pipeline: Pipeline, count: int, seed: int = 0) -> dict[str, float]:
    """Share of captions whose attributes are all right, early and late, held-out combinations among them."""
    generator = random.Random(seed)
    asked = generator.sample(sorted(held_out(), key=str), min(count // 4, 36))
    asked += generator.sample([a for a in ALL if a not in held_out()], count - len(asked))
    right: dict[str, list[bool]] = {}
    for number, attributes in enumerate(track(asked, "captions")):
        chunks = video(pipeline, [caption(attributes, generator)], 10, number)
        for when, window in (("chunks_1_2", slice(1, 3)), ("chunks_8_9", slice(8, 10))):
            agrees = read(torch.cat(chunks[window])).agrees(attributes)
            right.setdefault(when, []).append(all(agrees.values()))
            for name, good in agrees.items():
                right.setdefault(f"{when}_{name}", []).append(good)
    return {name: sum(values) / len(values) for name, values in right.items()}


def switch_adoption(pipeline: Pipeline, count: int, seed: int = 1) -> dict[str, float]:
    """Of the attributes that a new prompt changes, how many are right in its second chunk; of the others likewise."""
    generator = random.Random(seed)
    changed: list[bool] = []
    kept: list[bool] = []
    for number in track(range(count), "switches"):
        before, after = generator.sample(ALL, 2)
        prompts = [caption(attributes, generator) for attributes in (before, after)]
        chunks = video(pipeline, prompts, SWITCH_AT + 2, 1000 + number)
        for name, good in read(chunks[SWITCH_AT + 1]).agrees(after).items():
            (kept if getattr(before, name) == getattr(after, name) else changed).append(good)
    return {
        "switch_adoption_within_2_chunks": sum(changed) / len(changed),
        "switch_kept_attributes": sum(kept) / len(kept),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m training.quality", description=__doc__)
    text = "weights, in the layout of the published checkpoints (default: the shipped ones)"
    parser.add_argument("folder", type=Path, nargs="?", default=SHIPPED, help=text)
    parser.add_argument("--out", type=Path, metavar="JSON", help="also write the figures to this file")
    parser.add_argument("--captions", type=int, default=200, help="default: %(default)s")
    parser.add_argument("--switches", type=int, default=100, help="default: %(default)s")
    arguments = parser.parse_args()
    pipeline = build_pipeline(arguments.folder)
    accuracy = attribute_accuracy(pipeline, arguments.captions)
    record = {
        "command": f"python -m training.quality --captions {arguments.captions} --switches {arguments.switches}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()}), no GPU",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "captions": arguments.captions,
        "switches": arguments.switches,
        "attribute_accuracy": min(accuracy["chunks_1_2"], accuracy["chunks_8_9"]),
        "attribute_accuracy_by": accuracy,
        **switch_adoption(pipeline, arguments.switches),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
