# SPDX-License-Identifier: Apache-2.0
"""The quality measure on videos whose quality is known, and the figures in the docs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Session
from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import CLEAR, RECACHE
from tests.fakes.service_bench import wait_until
from training.latents import HELD_OUT
from training.quality.__main__ import tables
from training.quality.measures import (
    QualityCase,
    after_30s,
    after_switch,
    early_and_late,
    held_out_captions,
    switches,
    through_240s,
)
from training.world import Attributes, Segment, draw, paths

pytestmark = pytest.mark.numeric

ROOT = Path(__file__).parents[2]
WAITING = """
import time
from tests.training.test_quality import worker_pid
from training.quality.__main__ import SHIPPED
from training.quality.workers import Workers
with Workers(SHIPPED) as workers:
    print(*workers.map("", worker_pid, [0]), flush=True)
    time.sleep(600)
"""


def worker_pid(runner: ModelRunner, case: int) -> int:
    return os.getpid()


def test_workers_end_with_a_killed_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = next(int(line) for line in parent.stdout if line.strip().isdecimal())
    parent.kill()
    parent.wait()
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


class Exact:
    """Stands where a model runner does and draws what the prompts ask for; on CLEAR it begins again in the middle."""

    def __init__(self, case: QualityCase, ruined_from: int = 1000) -> None:
        self.looks = [look for look in (case.before, case.attributes) if look is not None]
        self.ruined_from, self.place = ruined_from, (32.0, 32.0)

    def advance(self, session: Session) -> FrameChunk:
        switched = bool(session.pending)
        if switched:
            session.prompt = session.pending.pop()
        if switched and session.on_switch == CLEAR:
            self.place = (32.0, 32.0)
        segments = [Segment(attributes=self.looks[session.prompt.index], frames=13 if session.next_chunk else 9)]
        frames = draw(segments, self.place)[1 if session.next_chunk else 0 :]
        self.place = cast(tuple[float, float], tuple(paths(segments, self.place)[-1].tolist()))
        if session.next_chunk >= self.ruined_from:
            frames = frames.flip(2)  # triangles point down, what moves up moves down
        session.next_chunk += 1
        pictures = (frames.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        return FrameChunk(frames=np.ascontiguousarray(pictures), first_frame=0, prompt_index=0, seconds=0.0)


def exact(case: QualityCase, **how: Any) -> ModelRunner:
    return cast(ModelRunner, Exact(case, **how))


def test_what_is_drawn_exactly_is_read_as_right() -> None:
    for case in held_out_captions(12, seed=0):
        windows = early_and_late(exact(case), case)
        assert all(all(agrees.values()) for agrees in windows.values())
        assert after_30s(exact(case), case)


def test_what_goes_wrong_late_counts_late_only() -> None:
    case = next(case for case in held_out_captions(200, seed=0) if case.attributes.motion == "up")
    windows = early_and_late(exact(case, ruined_from=5), case)
    assert all(windows["chunks_1_2"].values())
    assert windows["chunks_8_9"]["motion"] is False
    assert windows["chunks_8_9"]["colour"] is True


def test_a_long_session_is_read_from_its_first_to_its_last_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.quality.measures.CHUNKS_240S", 9)
    case = next(case for case in held_out_captions(200, seed=0) if case.attributes.motion == "up")
    assert through_240s(exact(case), case) == [True] * 4
    assert through_240s(exact(case, ruined_from=7), case) == [True] * 3 + [False]


def test_held_out_combinations_are_among_the_captions() -> None:
    cases = held_out_captions(200, seed=0)
    assert len({case.attributes for case in cases}) == 200
    assert sum(case.attributes in HELD_OUT for case in cases) == len(HELD_OUT)


@pytest.mark.parametrize("number", range(6))
def test_a_switch_is_judged_by_what_it_changes(number: int) -> None:
    case = switches(6, 1, RECACHE)[number]
    result = after_switch(exact(case), case)
    assert case.before is not None
    assert len(result.changed) == sum(vars(case.before)[name] != value for name, value in vars(case.attributes).items())
    assert len(result.changed) + len(result.kept) == 4
    assert all(result.changed + result.kept)
    stays = QualityCase(script=case.script, attributes=case.attributes, before=case.before)
    unmoved = Exact(stays)
    unmoved.looks[1] = case.before  # the prompt is ignored
    ignored = after_switch(cast(ModelRunner, unmoved), stays)
    assert not any(ignored.changed)
    assert all(ignored.kept)


def test_a_cleared_cache_flickers_at_the_seam() -> None:
    look = Attributes(shape="square", colour="red", motion="right", background="black")
    script = switches(1, 1, RECACHE)[0].script
    seams = []
    for on_switch in (RECACHE, CLEAR):
        cleared = type(script)(prompts=script.prompts, seed=0, on_switch=on_switch)
        case = QualityCase(script=cleared, attributes=look, before=look)
        result = after_switch(exact(case), case)
        assert result.seam is not None
        seams.append(result.seam / result.steady)
    assert seams[0] == pytest.approx(1.0, abs=0.05)
    assert seams[1] > 5


def test_the_figures_in_the_docs_are_the_measured_ones() -> None:
    record = json.loads((ROOT / "results/quality.json").read_text(encoding="utf-8"))
    assert tables(record) in (ROOT / "training/README.md").read_text(encoding="utf-8")
