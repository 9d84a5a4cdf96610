# SPDX-License-Identifier: Apache-2.0
"""What several tests share: the golden files, a live server, and streams of both kinds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from client.video_stream import VideoStream
from longlive_serve.server import TritonServer
from tests.both_streams import BlockingAsyncVideoStream, Open
from tests.live import metric, start_server, wait_until

GOLDEN = Path(__file__).parent / "golden"


def golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """`name`.json (empty when there is none) and the tensors of `name`.safetensors (likewise)."""
    facts, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
    if not facts.exists() and not tensors.exists():
        raise FileNotFoundError(f"no golden file {name} in {GOLDEN}")
    return json.loads(facts.read_text()) if facts.exists() else {}, load_file(tensors) if tensors.exists() else {}


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
        return request.param(prompt, **({"resume_for": 0.0} | settings))  # type: ignore[no-any-return]

    return opened
