# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: exported graphs, servers, clocks, and both kinds of streams."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are too small for threads
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads it on import
os.environ.pop("COLUMNS", None)  # line width of commands; xdist sets it in its workers

from filelock import FileLock
from hypothesis import settings

from export.to_onnx import ExportResult, export, source_of_config
from longlive_client.video_stream import VideoStream
from longlive_serve.config.presets import DIT, MODELS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.triton_server.launcher import TritonServer
from tests.fakes.echo_server import Launched, write_repository
from tests.fakes.service_bench import Clock, wait_until
from tests.support.both_streams import BlockingAsyncVideoStream, Open
from tests.support.cases import write_case
from tests.support.live import metric, start_server

settings.register_profile("any machine", deadline=None)  # do not limit the time of an example
settings.load_profile("any machine")
signal.signal(signal.SIGINT, signal.default_int_handler)  # background shells ignore SIGINT

T = TypeVar("T")
FIRST = (
    "test_commands", "test_export", "test_stress", "test_live_faults", "test_quantization", "test_tensorrt",
    "test_server", "test_fused_dit", "test_start_failures", "test_live_server", "test_fused_vae", "test_start_paths",
    "test_training", "test_bench", "test_proxies", "test_snapshot", "test_portability", "test_kernels_compile",
    "test_in_flight", "test_cudnn_plans", "test_benchmark", "test_replay", "test_tensorrt_engine",
)  # fmt: skip
"""The slowest files run first, so that none of them runs alone at the end. Files that mostly wait are spread out, so
that others use the cores meanwhile."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(FIRST)))


@pytest.fixture(params=[False, True], ids=["host", "device"])
def either_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test with a synchronous and with an asynchronous model runner."""
    monkeypatch.setattr("tests.fakes.service_bench.CountingModelRunner.asynchronous", request.param)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A fake clock for the test's engine cores."""
    its_own = Clock()
    for module in ("core", "session_manager", "client_stream"):
        monkeypatch.setattr(f"longlive_serve.engine.{module}.time", its_own)
    return its_own


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> tuple[Path, T]:
    """A folder filled by `make`, and its return value; computed once for all xdist workers."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, returned = shared / name, shared / f"{name}.pickle"
    with FileLock(shared / f"{name}.lock"):
        if not returned.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            returned.write_bytes(pickle.dumps(make(folder)))
    return folder, pickle.loads(returned.read_bytes())


class ExportedGraphs:
    """Exports a preset with random weights in float32, once. Calling it returns the folder."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory

    def __call__(self, preset: str, variant: str) -> Path:
        return self._get(preset, variant)[0]

    def written(self, preset: str, variant: str) -> list[ExportResult]:
        """The export's results for each graph."""
        return self._get(preset, variant)[1]

    def _get(self, preset: str, variant: str) -> tuple[Path, list[ExportResult]]:
        def write(folder: Path) -> list[ExportResult]:
            # Only the DiT differs from variant to variant.
            models = list(MODELS) if variant == "base" else [DIT]
            source = source_of_config(ServeConfig(preset=preset, variant=variant))
            return list(export(source, models, "float32", folder, check=True))

        return made_once(self._factory, f"{preset}-{variant}", write)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraphs:
    return ExportedGraphs(tmp_path_factory)


@pytest.fixture(scope="session")
def case_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """The golden model as graphs, with absolute or relative RoPE, written by `export.to_onnx`."""

    def graphs(relative: bool) -> Path:
        name = "dit_tiny_infinity" if relative else "dit_tiny_rollout"

        def write(folder: Path) -> None:
            case = str(write_case(tmp_path_factory.mktemp(name), name))
            command = ["-m", "export.to_onnx", "--case", case, "--no-check", "--out", str(folder)]
            subprocess.run([sys.executable, *command], check=True)

        return made_once(tmp_path_factory, f"graphs-of-{name}", write)[0]

    return graphs


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A model repository with the echo model."""
    return write_repository(tmp_path / "models")


@pytest.fixture
def launch(repository: Path, tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    """Starts the server's command line with the echo model; arguments as for `Launched`."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, stderr: int | None = None) -> Launched:
            launched = Launched(repository, tmp_path / "scratch", *options, stderr=stderr)
            stack.callback(launched.process.wait)
            stack.callback(launched.process.kill)
            return launched

        yield start


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with start_server(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "server" in request.fixturenames:
        running = request.getfixturevalue("server")
        wait_until(lambda: metric(running, "live_sessions") + metric(running, "waiting_sessions") == 0)


@pytest.fixture(params=[VideoStream, BlockingAsyncVideoStream], ids=["sync", "async"])
def stream(request: pytest.FixtureRequest) -> Open:
    """Streams that do not resume: they raise when their connection breaks. test_resumable.py tests resuming."""

    def opened(prompt: str, **settings: Any) -> VideoStream:
        return request.param(prompt, **({"resume_for": 0.0} | settings))

    return opened


def pytest_xdist_auto_num_workers() -> int:
    """One more process than cores, because many tests wait; two more are slower. At most 8: each takes a gigabyte."""
    return min(8, 1 + len(os.sched_getaffinity(0)))
