# SPDX-License-Identifier: Apache-2.0
"""Where a device works beside the host, the next session's chunk is launched before the last one is waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from longlive_serve.backends.device import AsyncD2HCopy
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine import core
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.engine.snapshot import SUM_BYTES, _read_metadata, copy_to_host
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import Options
from tests.fakes.graphs_on_cpu import WAITS, graphs_on_cpu
from tests.fakes.service_bench import Bench, CountingModelRunner, bench, closed, wait_until


class Device(CountingModelRunner):
    """Works beside the host, and remembers what it was asked for, in order."""

    asynchronous = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []
        self.busy: set[str] = set()
        """Sessions whose chunks take until they are no more in it."""
        self.denoising: set[str] = set()
        """Those that take as long before they are decoded."""
        self.failing = ""
        """The session whose next chunk fails."""
        self.lost = False
        """What is launched now never comes."""
        self._launched: list[tuple[Sequence[FrameChunk], str]] = []
        self._lost: list[Sequence[FrameChunk]] = []

    def execute_model_async(self, session: Session, partial_chunks: bool = False) -> Sequence[FrameChunk]:
        self.calls.append(("launch", session.id))
        chunk = super().execute_model_async(session, partial_chunks)
        self._launched.append((chunk, session.id))
        if self.lost:
            self._lost.append(chunk)
        return chunk

    def wait_until_denoised(self, chunk: Sequence[FrameChunk]) -> None:
        wait_until(lambda: self._name(chunk) not in self.denoising)
        if any(chunk is lost for lost in self._lost):
            raise RuntimeError("the device is lost")

    def collect_output(self, chunk: Sequence[FrameChunk]) -> Iterator[FrameChunk]:
        name = self._name(chunk)
        self.calls.append(("finish", name))
        wait_until(lambda: name not in self.busy)
        if name == self.failing:
            raise RuntimeError("the device failed")
        yield from super().collect_output(chunk)

    def _name(self, chunk: Sequence[FrameChunk]) -> str:
        return next(name for launched, name in self._launched if launched is chunk)


@contextlib.contextmanager
def bench_of_device(**settings: Any) -> Iterator[tuple[Bench, Device]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.fakes.service_bench.CountingModelRunner", Device)
        with bench(**settings) as at:
            assert isinstance(at.runner, Device)
            yield at, at.runner


@contextlib.contextmanager
def busy(at: Bench, device: Device) -> Iterator[None]:
    """Those who come meanwhile are all there when it is over."""
    device.busy.add("nobody")
    at.start("nobody", chunks=1, end=True)
    wait_until(lambda: ("finish", "nobody") in device.calls)
    yield
    device.calls.clear()
    device.busy.remove("nobody")


def test_the_device_has_the_next_sessions_work_before_a_chunk_is_waited_for() -> None:
    with bench_of_device(slots=4) as (at, device):
        with busy(at, device):
            senders = [at.start(name, chunks=3, end=True) for name in "abc"]
        wait_until(closed(*senders))
    for what in ("launch", "finish"):
        assert [name for call, name in device.calls if call == what] == [*"abc" * 3]
    assert [what for what, _ in device.calls] == ["launch"] + ["launch", "finish"] * 8 + ["finish"]


def test_a_snapshot_is_read_before_the_next_sessions_chunk_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device does one thing after the other: what is read later would wait for that chunk."""
    with bench_of_device(slots=3) as (at, device):
        read = copy_to_host

        def note(session: Session) -> dict[str, AsyncD2HCopy]:
            device.calls.append(("read", session.id))
            return read(session)

        monkeypatch.setattr(core, "copy_to_host", note)
        with busy(at, device):
            options = Options(pace="asap", snapshot_every=2)
            senders = [at.start("a", chunks=4, end=True, options=options), at.start("b", chunks=4, end=True)]
        wait_until(closed(*senders))
    chunks = [
        facts_of(chunk)["next_chunk"] if chunk.snapshot else 0 for chunk in senders[0].chunks if len(chunk.frames)
    ]
    assert chunks == [0, 2, 0, 4]
    launched = [number for number, call in enumerate(device.calls) if call == ("launch", "a")]
    assert [device.calls[number + 1] == ("read", "a") for number in launched] == [False, True] * 2


def test_a_prompt_that_is_accepted_before_a_snapshot_is_sent_is_in_it() -> None:
    """The client need not send again what was accepted before its last snapshot came."""
    with bench_of_device() as (at, device):
        device.denoising.add("a")
        video = at.start("a", chunks=1, options=Options(pace="asap", snapshot_every=1))
        wait_until(lambda: ("launch", "a") in device.calls)
        accepted = at.ask("a", prompt="a bird")
        device.denoising.clear()
        wait_until(closed(video, accepted))
    assert [prompt["text"] for prompt in facts_of(video.chunks[-1])["pending"]] == ["a bird"]


def facts_of(chunk: FrameChunk) -> dict[str, Any]:
    return _read_metadata(chunk.snapshot[SUM_BYTES:])


def test_a_session_alone_is_not_launched_twice() -> None:
    with bench_of_device() as (at, device):
        wait_until(closed(at.start("a", chunks=4, end=True)))
    assert [what for what, _ in device.calls] == ["launch", "finish"] * 4


def test_who_leaves_while_a_chunk_is_in_flight_gets_none_and_leaves_the_slot() -> None:
    with bench_of_device(slots=2) as (at, device):
        with busy(at, device):
            stays, gone, waits = (at.start(name) for name in "abc")
            device.busy.add("a")
        wait_until(lambda: ("finish", "a") in device.calls)  # b is in flight
        gone.cancelled = True
        device.busy.clear()
        wait_until(lambda: len(waits.chunks) > 3 and len(stays.chunks) > 3)
        assert ("finish", "b") not in device.calls
        assert not any(len(chunk.frames) for chunk in gone.chunks)
        assert device.slots["c"] == device.slots["b"]


def test_a_chunk_that_fails_in_flight_ends_its_own_session() -> None:
    with bench_of_device(slots=2) as (at, device):
        device.failing = "a"
        failing, other = at.start("a"), at.start("b")
        wait_until(closed(failing))
        error = failing.errors[0]
        assert error.kind == RequestError.INTERNAL
        assert "the session failed: RuntimeError: the device failed" in str(error)
        seen = len(other.chunks)
        wait_until(lambda: len(other.chunks) > seen + 2)


def test_a_device_that_is_lost_ends_the_sessions_and_not_the_service() -> None:
    with bench_of_device(slots=2) as (at, device):
        device.lost = True
        senders = [at.start(name) for name in "ab"]
        wait_until(closed(*senders))
        texts = {str(error) for sender in senders for error in sender.errors}
        assert all("the server failed: RuntimeError: the device is lost" in text for text in texts)
        device.lost = False
        again = at.start("c", chunks=1, end=True)
        wait_until(closed(again))
        assert len(again.chunks) == 1


def test_a_last_snapshot_goes_on_after_what_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "longlive_serve.engine.session_manager.dump", lambda session, model: f"at {session.next_chunk}".encode()
    )
    with bench_of_device(slots=2) as (at, device):
        senders = [at.start(name, options=Options(pace="asap", snapshot_every=10**6)) for name in "ab"]
        wait_until(lambda: all(len(sender.chunks) > 2 for sender in senders))
        device.busy.add("a")
        wait_until(lambda: device.calls[-1] == ("finish", "a"))  # b is in flight
        at.service.drain()
        device.busy.clear()
        wait_until(closed(*senders))
    for sender in senders:
        sent = sum(len(chunk.frames) > 0 for chunk in sender.chunks)
        assert sender.chunks[-1].snapshot == f"at {sent}".encode()


@pytest.mark.parametrize(("backend", "decoder"), [("torch", "tiny"), ("fused", "wan")])
def test_chunks_in_flight_have_the_frames_that_they_have_alone(
    backend: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch among them. The fused backend computes all in graphs, whose memory the next chunk uses again."""
    tiny = PRESETS["tiny"]  # of one layer: the interpreter takes long for each
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(tiny, dit=dataclasses.replace(tiny.dit, num_layers=1)))
    config = ServeConfig(preset="tiny", backend=backend, decoder=decoder, device="cpu", slots=2)
    with graphs_on_cpu() if backend == "fused" else contextlib.nullcontext():
        runner = ModelRunner(build_backends(config), config.model_config)
        alone = [[frames(runner, session, chunk) for chunk in range(3)] for session in map(new_session, range(2))]
        runner.asynchronous = True
        sessions, together = [new_session(number) for number in range(2)], []
        for chunk in range(3):
            launched = []
            for session in sessions:
                switch(session, chunk)
                launched.append(runner.execute_model_async(session, partial_chunks=chunk % 2 == 1))
            together.append([np.concatenate([part.frames for part in runner.collect_output(one)]) for one in launched])
    for slot, chunks in enumerate(alone):
        for chunk, expected in enumerate(chunks):
            got = together[chunk][slot]
            assert np.abs(got.astype(int) - expected).max() <= 1
            assert (got != expected).mean() < 1e-3  # a latent frame at a time, it may be rounded the other way


def frames(runner: ModelRunner, session: Session, chunk: int) -> np.ndarray[Any, Any]:
    switch(session, chunk)
    return runner.advance(session).frames


def switch(session: Session, chunk: int) -> None:
    if session.slot == chunk - 1:
        session.add_prompt("a bird", NOW)


def new_session(slot: int) -> Session:
    return Session(id=f"s{slot}", prompt=Prompt(index=0, text="a fox"), noise=SeededNoise(slot), slot=slot)


class NoWaiting(TorchDispatchMode):
    """Fails where the host asks a tensor for its values: on a device it would wait for all that was launched."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in WAITS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_no_launch_waits_for_the_device(backend: str) -> None:
    """Neither the first one nor one with a new prompt: other sessions' frames would wait with it."""
    config = ServeConfig(preset="tiny", backend=backend, device="cpu", slots=2)
    runner, session = ModelRunner(build_backends(config), config.model_config), new_session(0)
    for chunk in range(3):
        if chunk == 2:
            session.add_prompt("a bird", NOW)
        with NoWaiting():
            launched = runner.execute_model_async(session)
        list(runner.collect_output(launched))


def test_a_chunk_takes_what_it_took_after_the_one_before_it() -> None:
    config = ServeConfig(preset="tiny", backend="torch", device="cpu", slots=2)
    runner = ModelRunner(build_backends(config), config.model_config)
    runner.asynchronous = True
    launched = [runner.execute_model_async(new_session(slot)) for slot in (0, 1)]
    began = time.monotonic()
    _, second = (list(runner.collect_output(chunk))[-1] for chunk in launched)
    assert 0 < second.seconds <= time.monotonic() - began
