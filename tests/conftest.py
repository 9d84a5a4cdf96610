# SPDX-License-Identifier: Apache-2.0
"""What several tests share: the golden files, a live server, and streams of both kinds."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks so small that threads would but wait for each other
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads it when it is imported

from safetensors.torch import load_file
from torch import Tensor

from client.video_stream import VideoStream
from export.to_onnx import Written, export, source_of_case, source_of_config
from longlive_serve.config import DIT, NETWORKS, ServeConfig
from longlive_serve.server import TritonServer
from tests.both_streams import BlockingAsyncVideoStream, Open
from tests.live import metric, start_server, wait_until

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that runs tests in the background has it ignored

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`name`.json (empty when there is none) and the tensors of `name`.safetensors (likewise)."""
    facts, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
    if not facts.exists() and not tensors.exists():
        raise FileNotFoundError(f"no golden file {name} in {GOLDEN}")
    return json.loads(facts.read_text()) if facts.exists() else {}, load_file(tensors) if tensors.exists() else {}


@pytest.fixture(params=[False, True], ids=["host", "device"])
def either_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Services under test have a pipeline that computes when it is asked, and one that does so beside the host."""
    monkeypatch.setattr("tests.service_bench.CountingPipeline.asynchronous", request.param)


class ExportedGraphs:
    """Exports a preset with random weights in float32, once; gives the folder."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory = factory
        self._made: dict[tuple[str, str], tuple[Path, list[Written]]] = {}

    def __call__(self, preset: str, variant: str) -> Path:
        return self._get(preset, variant)[0]

    def written(self, preset: str, variant: str) -> list[Written]:
        """What the export said of each graph."""
        return self._get(preset, variant)[1]

    def _get(self, preset: str, variant: str) -> tuple[Path, list[Written]]:
        if (preset, variant) not in self._made:
            folder = self._factory.mktemp(f"{preset}-{variant}")
            # Only the DiT differs from variant to variant.
            networks = list(NETWORKS) if variant == "base" else [DIT]
            source = source_of_config(ServeConfig(preset=preset, variant=variant))
            self._made[preset, variant] = folder, list(export(source, networks, "float32", folder, check=True))
        return self._made[preset, variant]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportedGraphs:
    return ExportedGraphs(tmp_path_factory)


@pytest.fixture(scope="session")
def case_graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """The golden network as graphs, by whether its RoPE is relative."""
    from tests.test_replay import write_case  # it needs `golden`

    folders = {}
    for relative, name in ((False, "dit_tiny_rollout"), (True, "dit_tiny_infinity")):
        folders[relative] = tmp_path_factory.mktemp("case")
        case = write_case(tmp_path_factory.mktemp(name), name)
        for _ in export(source_of_case(case), [DIT], "float32", folders[relative], check=False):
            pass
    return folders


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
    """Streams that raise when their connection breaks; how they go on instead is in test_resumable.py."""

    def opened(prompt: str, **settings: Any) -> VideoStream:
        return request.param(prompt, **({"resume_for": 0.0} | settings))

    return opened
