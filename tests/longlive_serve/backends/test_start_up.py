# SPDX-License-Identifier: Apache-2.0
"""The seconds of a start, by phase: each without those within it."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from triton import knobs

from longlive_serve.backends import start_up
from longlive_serve.backends.start_up import CAPTURE, CHOOSE, COMPILE, LOAD, PHASES, WARM_UP, measure_start, phase


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that goes when the test moves it: `now`, in seconds."""
    its_own = SimpleNamespace(now=0.0)
    monkeypatch.setattr(start_up, "time", SimpleNamespace(perf_counter=lambda: its_own.now))
    return its_own


def test_a_phase_is_told_without_those_within_it(clock: SimpleNamespace) -> None:
    @phase(CAPTURE)
    def capture() -> None:
        clock.now += 3

    with measure_start() as seconds:
        with phase(LOAD):
            clock.now += 1
            with phase(CHOOSE):
                clock.now += 10
                with phase(COMPILE):
                    clock.now += 100
        with phase(WARM_UP):
            clock.now += 2
            capture()
            capture()
    assert seconds == dict.fromkeys(PHASES, 0) | {LOAD: 1, CHOOSE: 10, COMPILE: 100, WARM_UP: 2, CAPTURE: 6}


def test_a_phase_that_fails_counts(clock: SimpleNamespace) -> None:
    def fail() -> None:
        with phase(LOAD), phase(CHOOSE):
            clock.now += 1
            raise ValueError("wrong")

    with measure_start() as seconds:
        with pytest.raises(ValueError, match="wrong"):
            fail()
        with phase(LOAD):
            clock.now += 5
    assert (seconds[LOAD], seconds[CHOOSE]) == (5, 1)


def test_nothing_is_measured_outside_of_a_start_nor_in_other_threads(clock: SimpleNamespace) -> None:
    def capture() -> None:
        with phase(CAPTURE):
            clock.now += 1

    with measure_start() as seconds:
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join()
    capture()
    assert clock.now == 2
    assert seconds == dict.fromkeys(PHASES, 0)


def test_what_triton_compiles_is_no_part_of_the_warm_up(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knobs.compilation, "listener", None)
    start_up.note_compilations()
    listener = knobs.compilation.listener
    assert listener is not None
    times = knobs.CompileTimes(ir_initialization=500_000, lowering_stages=[("ttir", 1_000_000)], store_results=500_000)
    with measure_start() as seconds, phase(WARM_UP):
        clock.now += 5
        listener(src="", metadata={}, metadata_group={}, times=times, cache_hit=False)
    assert (seconds[COMPILE], seconds[WARM_UP]) == (2, 3)


def test_a_process_knows_how_old_it_is() -> None:
    code = (
        "import time; time.sleep(0.5); from longlive_serve.backends.start_up import process_age; print(process_age())"
    )
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.4 < age < time.monotonic() - began + 0.1  # ticks of 10 ms


def test_short_phases_are_not_told() -> None:
    assert start_up.describe({"load": 1.26, "choose": 0.01, "warm_up": 0.3}) == "load 1.3 s, warm-up 0.3 s"
