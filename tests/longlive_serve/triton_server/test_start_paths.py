# SPDX-License-Identifier: Apache-2.0
"""The server starts and serves from any path: its settings, weights, adapters, traces, scratch folder and checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_client.cli.set_lora import set_adapters
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, Adapter, ServeConfig
from longlive_serve.doctor import __main__ as doctor
from longlive_serve.protocol.errors import RequestError, ServerStartError
from longlive_serve.triton_server.launcher import TritonServer
from longlive_serve.triton_server.safe_paths import SafePaths, is_safe, make_scratch
from tests.fakes.echo_server import EchoStream
from tests.support.live import frames_of, play
from tests.support.weights_files import lora_state, write_wan

ROOT = Path(__file__).parents[3]
AWKWARD = ["my projekt (ü) [1]", 'it\'s 5 & more; $HOME `x` "y" \\z', "大 モデル, a=b:c #d"]
TOKEN = "an admin's own token"


def write_settings(folder: Path) -> Path:
    """Settings of the tiny preset whose files all lie in `folder`, with names that Triton and its Python dislike."""
    write_wan(folder / "gewichte ü")
    for name in ("stil, 大.safetensors", "zwei.safetensors"):
        save_file(lora_state(), folder / name)
    (folder / "adapters ü").mkdir()
    torch.save(lora_state(seed=2), folder / "adapters ü" / "später, 大.pt")
    config = ServeConfig(
        preset="tiny",
        weights="gewichte ü",
        lora=(Adapter(path=Path("stil, 大.safetensors"), scale=0.5),),
        adapters_dir="adapters ü",
        admin_token=TOKEN,
        trace_dir="spuren/ü",
        slots=2,
    )
    path = folder / "einstellungen ü.toml"
    path.write_text("# Größe 大小\n" + config.to_toml(), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", AWKWARD)
def test_a_server_whose_files_lie_at_awkward_paths_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = tmp_path / name
    (folder / "tmp").mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(folder / "tmp"))
    settings = write_settings(folder)
    config = ServeConfig.from_toml(settings)
    assert Path(config.weights) == folder / "gewichte ü"
    with TritonServer(config=settings) as server:
        assert str(folder / "stil, 大.safetensors") in server.log_text, "the log says the names that people know"
        assert "link" not in server.log_text
        plain = frames_of(play(server, seed=1, chunks=3))
        said = set_adapters(server.grpc_url, {"später, 大.pt": 2.0}, TOKEN)
        assert said == "adapters: später, 大.pt=2"
        assert not np.array_equal(frames_of(play(server, seed=1, chunks=3)), plain)
        with pytest.raises(RequestError, match=r"got 'ü\.pt', expected some of \['später, 大\.pt'\]"):
            set_adapters(server.grpc_url, {"ü.pt": 1.0}, TOKEN)
    assert len(list((folder / "spuren" / "ü").glob("*.json"))) == 2
    assert list((folder / "tmp").iterdir()) == []


def test_a_file_that_is_wrong_is_called_by_its_own_name(tmp_path: Path) -> None:
    folder = tmp_path / "ü (1)"
    folder.mkdir()
    settings = write_settings(folder)
    (folder / "stil, 大.safetensors").write_bytes(b"no adapter")
    with pytest.raises(ServerStartError) as raised, TritonServer(config=settings):
        pass
    assert f"{folder / 'stil, 大.safetensors'}: cannot be read as tensors" in str(raised.value)


def test_the_doctor_reads_the_same_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / AWKWARD[0]
    folder.mkdir()
    free = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    assert doctor.main(["--config", str(write_settings(folder)), *free, "--json"]) == 0
    assert "can serve here" in capsys.readouterr().out


def environment_at(folder: Path, python: Path) -> Path:
    """A virtual environment of `python` in `folder`, with the packages of this one; gives its interpreter."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    packages.rmdir()
    packages.symlink_to(sysconfig.get_path("purelib"))
    return folder / "bin" / "python"


@pytest.mark.parametrize("name", AWKWARD[:2])
def test_a_checkout_an_environment_and_a_python_at_awkward_paths_serve(
    tmp_path: Path,
    repository: Path,
    name: str,
) -> None:
    folder = tmp_path / name
    folder.mkdir()
    shutil.copytree(ROOT / "longlive_serve", folder / "longlive_serve", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(repository, folder / "models")
    (folder / "python 大").symlink_to(sys.base_prefix)
    base = folder / "python 大" / "bin" / Path(sys._base_executable).resolve().name  # type: ignore[attr-defined]
    python = environment_at(folder / "env ü", base)
    ports = [f"--{port}-port=0" for port in ("grpc", "http", "metrics")]
    command = [str(python), "-m", "longlive_serve.triton_server", "--model-repository=models", *ports]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            ready = process.stdout.readline()
            with EchoStream(ready.partition("gRPC ")[2].partition(",")[0]) as stream:
                stream.send(chunks=None, end=True)
                slots, package = stream.notice().split(maxsplit=1)
            assert slots == "7"
            assert "/link" in package, "it is this checkout's, by a link"
        finally:
            process.terminate()
    assert process.returncode == 0


# The links


def test_safe_paths_are_handed_on_as_they_are(tmp_path: Path) -> None:
    paths = SafePaths(tmp_path)
    assert paths.safe(Path("/opt/models-1.3_b/x@y+z=1%")) == Path("/opt/models-1.3_b/x@y+z=1%")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("character", [*" ()[]{}'\"`$&;|<>*?!#~\\^,:\t", "ü", "大", "\N{GRINNING FACE}", "\u0301"])
def test_a_link_stands_for_every_other_path(tmp_path: Path, character: str) -> None:
    target = tmp_path / f"a{character}b.safetensors"
    target.write_text("here", encoding="utf-8")
    (tmp_path / "scratch").mkdir()
    paths = SafePaths(tmp_path / "scratch")
    link = paths.safe(target)
    assert is_safe(link)
    assert link.suffix == ".safetensors"
    assert link.read_text(encoding="utf-8") == "here"
    assert paths.safe(target) == link
    assert paths.rename(f"in {link}: gone\n") == f"in {target}: gone\n"


def test_links_in_json_lines_are_renamed_as_json(tmp_path: Path) -> None:
    paths = SafePaths(tmp_path)
    link = paths.safe(Path('/a "b" \\c'))
    assert paths.rename(f'{{"message": "{link}"}}') == '{"message": "/a \\"b\\" \\\\c"}'


def test_the_scratch_folder_goes_past_an_awkward_tmpdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mit ü", "none"):
        monkeypatch.setenv("TMPDIR", str(tmp_path / name))
        scratch = make_scratch()
        assert is_safe(scratch)
        scratch.rmdir()
    monkeypatch.setattr("longlive_serve.triton_server.safe_paths.SCRATCH_FOLDERS", (str(tmp_path / "none"),))
    with pytest.raises(ServerStartError, match=r"no folder for temporary .*none \(No such file.*set TMPDIR to a"):
        make_scratch()


def test_random_weights_are_no_path(tmp_path: Path) -> None:
    named = ServeConfig(lora=(Adapter(path=Path("b"), scale=2.0),), trace_dir="c")
    config = named.with_paths(lambda path: tmp_path / path)
    assert config.weights == RANDOM_WEIGHTS
    assert config.lora == (Adapter(path=tmp_path / "b", scale=2.0),)
    assert config.trace_dir == str(tmp_path / "c")
    assert config.graphs == ""
