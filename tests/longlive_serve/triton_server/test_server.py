# SPDX-License-Identifier: Apache-2.0
"""Starting and ending the server: what it refuses, and that it leaves nothing behind. The model is an echo."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

import longlive_serve
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.protocol.messages import INPUTS, MODEL_NAME, OUTPUTS, TensorSpec
from longlive_serve.triton_server import find_triton
from longlive_serve.triton_server.addresses import Address, choose_ports
from longlive_serve.triton_server.arguments import DEFAULT_REPOSITORY
from longlive_serve.triton_server.launcher import TritonServer
from stress.viewers import count_resources, remaining_resources
from tests.fakes.echo_server import EchoStream, Launched
from tests.fakes.service_bench import LIMIT_S, wait_until


def as_spec(tensor: Any) -> TensorSpec:
    dtype = model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
    return TensorSpec(name=tensor.name, dtype=dtype, shape=tuple(tensor.dims))


def test_the_model_configuration_declares_the_wire() -> None:
    text = (DEFAULT_REPOSITORY / MODEL_NAME / "config.pbtxt").read_text(encoding="utf-8")
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.name == MODEL_NAME
    assert tuple(map(as_spec, config.input)) == INPUTS
    assert tuple(map(as_spec, config.output)) == OUTPUTS
    assert all(tensor.optional for tensor in config.input)
    assert config.max_batch_size == 0
    assert config.model_transaction_policy.decoupled


def test_the_model_gets_the_settings_and_this_package(repository: Path) -> None:
    with TritonServer(model_repository=repository) as server, EchoStream(server.grpc_url) as stream:
        stream.send(chunks=None, end=True)
        slots, package = stream.notice().split()
        assert slots == "7"
        assert Path(package).samefile(longlive_serve.__file__)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ended_server_exits_with_0_and_leaves_nothing_behind(
    launch: Callable[..., Launched], number: signal.Signals
) -> None:
    launched = launch()
    assert launched.ready_line.startswith("ready: gRPC 127.0.0.1:")
    assert len(launched.leftovers()) >= 4, "Triton, the model, a scratch folder, shared memory"
    launched.process.send_signal(number)
    assert launched.process.wait(LIMIT_S) == 0
    assert launched.leftovers() == []


def test_an_open_stream_delays_the_end_for_the_drain_time_only(launch: Callable[..., Launched]) -> None:
    launched = launch("--drain-timeout=1")
    with EchoStream(launched.grpc_url) as stream:
        stream.send(chunks=0, end=False)
        stream.notice()
        launched.process.send_signal(signal.SIGINT)
        assert launched.process.wait(LIMIT_S) == 0
        assert launched.leftovers() == []
        assert stream.answers.get(timeout=LIMIT_S)[1] is not None


def test_a_second_interrupt_ends_the_server_at_once(launch: Callable[..., Launched]) -> None:
    launched = launch("--drain-timeout=600")
    with EchoStream(launched.grpc_url) as stream:
        stream.send(chunks=0, end=False)
        stream.notice()
        launched.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping: clients have 600 s to leave" in launched.said)
        assert launched.process.poll() is None
        launched.process.send_signal(signal.SIGINT)
        assert launched.process.wait(LIMIT_S) == 0
        assert launched.leftovers() == []


def test_a_killed_launcher_takes_everything_with_it(launch: Callable[..., Launched]) -> None:
    launched = launch()
    with EchoStream(launched.grpc_url) as stream:
        stream.send(chunks=0, end=False)
        stream.notice()
        launched.process.kill()
        wait_until(lambda: not launched.leftovers())


def test_a_model_that_does_not_load_is_reported_with_its_own_words(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text('preset = "tiny"\nweights = "missing"\n')
    server = TritonServer(model_repository=repository, config=tmp_path / "serve.toml")
    with pytest.raises(ServerStartError, match=r"(?s)before the model was ready:.*there are no weights"), server:
        pass


def test_a_triton_that_dies_is_an_error(repository: Path) -> None:
    server = TritonServer(model_repository=repository)
    with server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerStartError, match="ended with exit status -9 by itself"):
            server.wait()


@pytest.mark.parametrize(("name", "words"), [("grpc", "gRPC"), ("http", "HTTP"), ("metrics", "metrics")])
def test_a_port_in_use_is_named(name: str, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        expected = rf"port {port} \({words}\): in use on 127.0.0.1; stop what listens there or .* --{name}-port"
        with pytest.raises(ServerStartError, match=expected), TritonServer(**{f"{name}_port": port}):
            pass


def test_ports_must_differ_and_exist() -> None:
    with pytest.raises(ServerStartError, match="expected three different ones"), TritonServer(grpc_port=9, http_port=9):
        pass
    with (
        pytest.raises(ServerStartError, match=r"port 70000 \(HTTP\): expected 0 to 65535"),
        TritonServer(http_port=70000),
    ):
        pass


def test_a_missing_server_is_reported_with_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(find_triton, "SYSTEM_SERVER", tmp_path / "tritonserver")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerStartError, match=r"on PATH.*pip install 'longlive-serve\[triton\]'"):
        find_triton.find_install(tmp_path)


def test_a_server_on_the_path_is_preferred(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binary = tmp_path / "tritonserver"
    binary.write_text("#!/bin/sh\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    install = find_triton.find_install(tmp_path)
    assert (install.binary, install.backends) == (binary, None)


def test_a_python_without_a_stub_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(find_triton, "SYSTEM_SERVER", tmp_path / "tritonserver")
    monkeypatch.setattr(sys, "version_info", SimpleNamespace(major=3, minor=99))
    with pytest.raises(
        ServerStartError, match=r"Python 3\.99: nvidia-pytriton has no backend stub for it, only for 3\.8, "
    ):
        find_triton.find_install(tmp_path)


def test_numpy_2_is_refused_before_it_kills_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(find_triton, "SYSTEM_SERVER", tmp_path / "tritonserver")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.1.0")
    with pytest.raises(ServerStartError, match=r"numpy: got 2\.1\.0, expected below 2"):
        find_triton.find_install(tmp_path)


def test_wrong_settings_name_the_file_and_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.toml"
    config.write_text("slotz = 3\n")
    command = [sys.executable, "-m", "longlive_serve.triton_server", f"--config={config}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"error: {config}: got unknown key 'slotz'" in done.stderr


def test_a_folder_that_is_no_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "serve.toml").write_text("")
    server = TritonServer(model_repository=tmp_path, config=tmp_path / "serve.toml")
    with pytest.raises(ServerStartError, match=rf"got no {MODEL_NAME}/config.pbtxt in it"), server:
        pass


def test_a_port_that_is_taken_after_it_was_chosen_is_chosen_again(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[dict[str, int]] = []
    with socket.create_server(("127.0.0.1", 0)) as neighbour:

        def choose(address: Address, ports: Mapping[str, int]) -> dict[str, int]:
            chosen.append(choose_ports(address, ports))
            return chosen[-1] | ({"grpc": neighbour.getsockname()[1]} if len(chosen) == 1 else {})

        monkeypatch.setattr("longlive_serve.triton_server.launcher.choose_ports", choose)
        with TritonServer(model_repository=repository) as server:
            assert len(chosen) == 2
            assert server.grpc_url.endswith(str(chosen[1]["grpc"]))


def test_what_is_left_of_servers_is_seen_while_they_are_there(repository: Path) -> None:
    assert count_resources() == {}
    with TritonServer(model_repository=repository):
        assert count_resources() == {"processes": 3, "shared_memory": 1}
    assert not any(remaining_resources().values())
