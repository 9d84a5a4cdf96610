# SPDX-License-Identifier: Apache-2.0
"""Adapters that change while a real server runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from longlive_client.cli.health import probe
from longlive_client.cli.set_lora import main, set_adapters
from longlive_client.video_stream import VideoStream
from longlive_serve.config.presets import PRESETS
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import READY
from longlive_serve.triton_server.launcher import TritonServer
from tests.fakes.service_bench import LIMIT_S
from tests.support.live import frames_of, metric, play, start_server

TOKEN = "an admin's own token"
DIM = PRESETS["tiny"].dit.dim


def write_adapter(path: Path, dim: int = DIM, layer: str = "self_attn.q") -> None:
    torch.manual_seed(1)
    name = f"base_model.model.blocks.0.{layer}"
    torch.save({f"{name}.lora_A.weight": torch.randn(4, dim), f"{name}.lora_B.weight": torch.randn(dim, 4)}, path)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    folder = tmp_path_factory.mktemp("adapters")
    (folder / "files").mkdir()
    write_adapter(folder / "files" / "style.pt")
    write_adapter(folder / "files" / "other_size.pt", dim=DIM // 2)
    write_adapter(folder / "files" / "other_model.pt", layer="attn.to_q")
    (folder / "files" / "broken.pt").write_bytes(b"no adapter")
    with start_server(folder, adapters_dir="files", admin_token=TOKEN) as running:
        yield running


def test_sessions_begun_before_keep_their_frames_and_later_ones_have_the_adapter(server: TritonServer) -> None:
    plain = frames_of(play(server, seed=5, chunks=6))
    with VideoStream("a red fox runs", url=server.grpc_url, seed=5, chunks=2, pace="asap") as before:
        begun = [chunk.frames for chunk in before.chunks()]
        assert set_adapters(server.grpc_url, {"style.pt": 0.8}, TOKEN) == "adapters: style.pt=0.8"
        styled = frames_of(play(server, seed=5, chunks=6))
        before.request_chunks(4)
        begun += [chunk.frames for chunk in before.chunks()]
    assert np.array_equal(np.concatenate(begun), plain)
    assert not np.array_equal(styled, plain)
    assert set_adapters(server.grpc_url, {"style.pt": -0.8}, TOKEN) == "adapters: style.pt=-0.8"
    assert not np.array_equal(frames_of(play(server, seed=5, chunks=6)), styled)
    assert set_adapters(server.grpc_url, {"style.pt": 0.8}, TOKEN) == "adapters: style.pt=0.8"
    assert np.array_equal(frames_of(play(server, seed=5, chunks=6)), styled)
    assert set_adapters(server.grpc_url, {}, TOKEN) == "adapters: only those in the settings"
    assert np.array_equal(frames_of(play(server, seed=5, chunks=6)), plain)


@pytest.mark.parametrize(
    ("adapters", "token", "said"),
    [
        ({"style.pt": 1.0}, "not that admin's token", "[forbidden] OPTIONS.admin_token: expected the admin_token"),
        ({"none.pt": 1.0}, TOKEN, "got 'none.pt', expected some of ['broken.pt', 'other_model.pt', 'other_size.pt', "),
        ({"../serve.toml": 1.0}, TOKEN, "got '../serve.toml', expected some of"),
        ({"style.pt": 1e9}, TOKEN, "OPTIONS.adapters.style.pt: got 1000000000.0, expected a scale"),
        ({"other_size.pt": 1.0}, TOKEN, "other_size.pt: "),
        ({"other_model.pt": 1.0}, TOKEN, "other_model.pt: "),
        ({"broken.pt": 1.0}, TOKEN, "broken.pt: cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    server: TritonServer, adapters: dict[str, float], token: str, said: str
) -> None:
    plain = frames_of(play(server, seed=6, chunks=2))
    with pytest.raises(RequestError) as refused:
        set_adapters(server.grpc_url, adapters, token)
    assert said in str(refused.value)
    assert np.array_equal(frames_of(play(server, seed=6, chunks=2)), plain)
    assert metric(server, "failed_sessions") == 0
    assert probe(server.grpc_url, LIMIT_S) == READY


def test_the_command_says_what_is_in_force(server: TritonServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = ["--url", server.grpc_url, "--admin-token", TOKEN]
    assert main([*url, "style.pt=0.5"]) == 0
    assert capsys.readouterr().out == "adapters: style.pt=0.5\n"
    assert main([*url, "nothing.pt"]) == 1
    assert "got 'nothing.pt'" in capsys.readouterr().err
    assert main(url) == 0
    with pytest.raises(SystemExit):
        main([*url, "style.pt=much"])
