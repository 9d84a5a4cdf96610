# SPDX-License-Identifier: Apache-2.0
"""What ends a start, or a server, says why and at once; and what must not end it does not."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from longlive_client.proxies import open_http
from longlive_serve.doctor import __main__ as doctor
from longlive_serve.doctor.check_result import ERROR
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.protocol.messages import MODEL_NAME
from longlive_serve.triton_server.__main__ import main
from longlive_serve.triton_server.addresses import find_address
from longlive_serve.triton_server.launcher import PROBE_EXIT, TritonServer
from longlive_serve.triton_server.process_group import ProcessGroup
from longlive_serve.triton_server.tls_files import TlsFiles
from tests.fakes.echo_server import EchoStream, Launched
from tests.fakes.service_bench import wait_until
from tests.support.live import children_of

FREE = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
CRASH = "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)"
Launch = Callable[..., Launched]


def refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the server says instead of starting; the doctor must say the same."""
    try:
        status = main([*FREE, *options])
    except SystemExit as exit_:  # an option that argparse refuses
        return f"{exit_.code}: {capsys.readouterr().err}"
    said = capsys.readouterr().err
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert doctor.main([*FREE, *options, "--json"]) == 1
    sections = json.loads(capsys.readouterr().out)["sections"]
    told = [result["message"] for section in sections for result in section["results"] if result["level"] == ERROR]
    assert any(message in line for message in told), told
    return line


# A model that ends


@pytest.mark.parametrize(
    ("code", "how", "words"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL", "(no output)"),
        ("print('no room left', flush=True); os._exit(3)", "ended with exit status 3", "no room left"),
        (
            "import faulthandler, ctypes; faulthandler.enable(); ctypes.string_at(0)",
            "was killed by SIGSEGV",
            "string_at",
        ),
        ("sys.exit('no GPU')", "", "no GPU"),
        ("import no_such_package", "", "No module named 'no_such_package'"),
        ("raise RuntimeError('größe 大')", "", "größe 大"),
    ],
)
def test_a_model_that_ends_ends_the_start_with_its_own_words(
    repository: Path,
    code: str,
    how: str,
    words: str,
) -> None:
    model = f"import os, sys\nclass TritonPythonModel:\n    def initialize(self, args):\n        {code}\n"
    (repository / MODEL_NAME / "1" / "model.py").write_text(model, encoding="utf-8")
    with pytest.raises(ServerStartError) as raised, TritonServer(model_repository=repository, ready_timeout_s=3600):
        pass
    assert re.search(rf"{how}.* before the model was ready:\n", str(raised.value)), raised.value
    assert words in str(raised.value)


def test_a_model_that_cannot_even_be_started_ends_the_start(repository: Path) -> None:
    (repository / MODEL_NAME / "1" / "model.py").write_text("class TritonPythonModel\n", encoding="utf-8")
    with pytest.raises(ServerStartError, match=r"(?s)before the model was ready:.*SyntaxError"):
        TritonServer(model_repository=repository, ready_timeout_s=3600).__enter__()


def test_a_server_whose_model_dies_ends_with_1_and_leaves_nothing_behind(launch: Launch) -> None:
    launched = launch()
    (triton,) = (pid for pid in children_of(launched.process.pid) if name_of(pid).startswith("tritonserver"))
    (stub,) = children_of(triton)
    os.kill(stub, signal.SIGKILL)
    assert launched.process.wait() == 1
    assert "error: the model's process was killed by SIGKILL by itself:\n" in launched.said
    assert launched.leftovers() == []


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8")


# Where its words go


def test_a_server_goes_on_when_nobody_reads_what_it_says(launch: Launch) -> None:
    read, write = os.pipe()
    goes_on(launch("--verbose", stderr=write))
    os.close(write)
    os.close(read)


def test_a_server_goes_on_when_its_reader_has_gone(launch: Launch) -> None:
    read, write = os.pipe()
    launched = launch("--verbose", stderr=write)
    os.close(write)
    os.close(read)
    goes_on(launched)


def test_a_server_goes_on_when_the_disk_under_its_log_is_full(launch: Launch) -> None:
    with Path("/dev/full").open("wb") as full:
        goes_on(launch("--verbose", stderr=full.fileno()))


def goes_on(launched: Launched) -> None:
    """It answers while its log is many times what a pipe holds: the echo logs 100 kB a request."""
    assert all(launched.echo() for _ in range(10))
    launched.process.terminate()
    assert launched.process.wait() == 0


def test_a_server_goes_on_when_all_its_outputs_are_closed(repository: Path) -> None:
    with TritonServer(model_repository=repository) as free:
        ports = {name: getattr(free, f"{name}_url").rpartition(":")[2] for name in ("grpc", "http", "metrics")}
    options = [f"--model-repository={repository}", *(f"--{name}-port={port}" for name, port in ports.items())]
    command = shlex.join([sys.executable, "-m", "longlive_serve.triton_server", "--verbose", *options])
    with subprocess.Popen(["/bin/sh", "-c", f"exec {command} <&- >&- 2>&-"]) as process:
        try:
            wait_until(lambda: is_ready(f"http://127.0.0.1:{ports['http']}/v2/models/{MODEL_NAME}/ready"))
            for _ in range(10):
                with EchoStream(f"127.0.0.1:{ports['grpc']}") as stream:
                    stream.send(chunks=None, end=True)
                    assert stream.notice()
        finally:
            process.terminate()
    assert process.returncode == 0


def is_ready(url: str) -> bool:
    with contextlib.suppress(OSError), open_http(url, timeout_s=1) as answer:
        return bool(answer.status == 200)
    return False


# Where it listens


@pytest.mark.parametrize(
    ("host", "message"),
    [
        ("", "host: got '', expected an address of this machine"),
        (" ", "host: got ' ', expected an address of this machine"),
        ("[]", "host: got '[]', expected an address of this machine"),
        ("0", "host: got '0', which is every address of this machine; say 0.0.0.0 or :: to mean it"),
        ("no.such.host.invalid", "host: got 'no.such.host.invalid', expected an address of this machine"),
        ("ü" * 70, "expected an address of this machine"),
        ("fe80::1%lo", "host: got 'fe80::1%lo', expected an address"),
        ("192.0.2.1", "port 0 (gRPC): cannot listen on 192.0.2.1"),
        ("2001:db8::1", "port 0 (gRPC): cannot listen on 2001:db8::1"),
    ],
)
def test_a_host_that_is_none_of_this_machine_is_refused(
    capsys: pytest.CaptureFixture[str], host: str, message: str
) -> None:
    assert message in refusal(capsys, f"--host={host}")


@pytest.mark.parametrize(
    ("host", "where"), [("::1", "[::1]:"), ("[::1]", "[::1]:"), ("::", "[::1]:"), ("0.0.0.0", "127.0.0.1:")]
)
def test_ipv6_and_all_addresses_serve(repository: Path, host: str, where: str) -> None:
    with TritonServer(model_repository=repository, host=host) as server:
        assert server.grpc_url.startswith(where)
        assert bool(server.scope) == (host in ("::", "0.0.0.0"))
        urls = [server.grpc_url] if host != "::" else [server.grpc_url, server.grpc_url.replace("[::1]", "127.0.0.1")]
        for url in urls:
            with EchoStream(url) as stream:
                stream.send(chunks=None, end=True)
                assert stream.notice()


def test_a_name_means_its_ipv4_address_where_it_has_both() -> None:
    assert str(find_address("localhost").ip) == "127.0.0.1"


# TLS


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls ü")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("own", "other"):
        issued = authority.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    key = serialization.load_pem_private_key((folder / "own.key").read_bytes(), None)
    kinds = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
    (folder / "locked.key").write_bytes(key.private_bytes(*kinds, serialization.BestAvailableEncryption(b"secret")))
    der = key.private_bytes(serialization.Encoding.DER, kinds[1], serialization.NoEncryption())
    (folder / "der.key").write_bytes(der)
    (folder / "empty.pem").write_bytes(b"")
    (folder / "folder.pem").mkdir()
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("own.pem", "locked.key", None), "locked.key: got an encrypted key, expected one without a password"),
        (("own.pem", "other.key", None), "other.key: got the key of another certificate, expected that of"),
        (("own.pem", "own.pem", None), "own.pem: got no private key"),
        (("own.pem", "der.key", None), "der.key: got no private key"),
        (("own.pem", "empty.pem", None), "empty.pem: got no private key"),
        (("own.key", "own.key", None), "own.key: got no certificate"),
        (("empty.pem", "own.key", None), "empty.pem: got no certificate"),
        (("none.pem", "own.key", None), "none.pem: no such file"),
        (("own.pem", "folder.pem", None), "folder.pem: no such file"),
        (("own.pem", "own.key", "own.key"), "--tls-client-ca"),
    ],
)
def test_files_that_tls_cannot_use_are_named_before_the_start(
    capsys: pytest.CaptureFixture[str], pems: Path, files: tuple[str, str, str | None], message: str
) -> None:
    names = ("cert", "key", "client-ca")
    options = [f"--tls-{name}={pems / file}" for name, file in zip(names, files, strict=True) if file]
    assert message in refusal(capsys, *options)


def test_files_that_fit_are_taken(pems: Path) -> None:
    TlsFiles(cert=pems / "own.pem", key=pems / "own.key", client_ca=pems / "ca.pem").check()
    TlsFiles().check()


def test_half_of_tls_is_refused(capsys: pytest.CaptureFixture[str], pems: Path) -> None:
    assert "2: " in (said := refusal(capsys, f"--tls-cert={pems / 'own.pem'}"))
    assert "tls: got some of cert, key and client_ca" in said


# Times and settings


@pytest.mark.parametrize("option", ["drain", "ready"])
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "-1", "1e9"])
def test_times_that_are_none_are_refused_by_name(capsys: pytest.CaptureFixture[str], option: str, value: str) -> None:
    said = refusal(capsys, f"--{option}-timeout={value}")
    assert said.startswith("2: ")
    assert re.search(rf"{option}_timeout_s \(--{option}-timeout\): got \S+, expected 0 to 86400 seconds", said)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("slots = 3".encode("utf-16"), "got UTF-16 text"),
        (b"# Gr\xf6\xdfe\n", "not UTF-8"),
        (b'weights = "C:\\Users\\me"', "C:/folder"),
        (b"slotz = 3", "unknown key 'slotz'"),
        (b'lora = "a.pt=0.5"', "lora: got 'a.pt=0.5', expected one or more tables"),
    ],
)
def test_the_doctor_says_of_settings_what_the_server_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(content)
    assert message in refusal(capsys, f"--config={path}")


def test_settings_with_a_byte_order_mark_start(repository: Path, tmp_path: Path) -> None:
    path = tmp_path / "bom.toml"
    path.write_bytes('preset = "tiny"  # Größe\nslots = 5\n'.encode("utf-8-sig"))
    with TritonServer(model_repository=repository, config=path) as server, EchoStream(server.grpc_url) as stream:
        stream.send(chunks=None, end=True)
        assert stream.notice().startswith("5 ")


def test_a_probe_that_triton_has_not_waited_for_yet_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine Triton waits late for the process with which it checks that one starts."""
    ends = iter([PROBE_EXIT, PROBE_EXIT, PROBE_EXIT, ""])
    monkeypatch.setattr("longlive_serve.triton_server.launcher.time.sleep", lambda seconds: None)
    server = TritonServer()
    server._group = cast(
        ProcessGroup,
        SimpleNamespace(
            dead_child=lambda: next(ends),
            log=SimpleNamespace(has_errors=lambda: False),
            process=SimpleNamespace(poll=lambda: None),
        ),
    )
    server._check_alive("before the model was ready")
    assert next(ends, None) is None
