# SPDX-License-Identifier: Apache-2.0
"""serve.toml: what is accepted, what is refused and how."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from longlive_serve.config.presets import PRESETS
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, Adapter, ServeConfig
from longlive_serve.weights.layouts import DIT_FILE

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "model_repository/longlive/1/serve.toml"


def test_the_shipped_settings_serve_the_demo_model() -> None:
    config = ServeConfig.from_toml(SHIPPED)
    assert config.preset == "demo"
    assert Path(config.weights) == SHIPPED.parent / "demo"
    assert Path(config.weights, DIT_FILE).is_file()
    assert dataclasses.replace(config, preset="tiny", weights=RANDOM_WEIGHTS) == ServeConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slot = 3", "got unknown key 'slot', expected some of ['"),
        ("slots = 0", "slots: got 0, expected 1 or more"),
        ("slots = true", "slots: got True, expected int"),
        ("slots = '2'", "slots: got '2', expected int"),
        ("preset = 'huge'", "preset: got 'huge', expected one of ['longlive-1.3b', 'demo', 'tiny']"),
        ("variant = 'endless'", "variant: got 'endless', expected one of ['base', 'infinity']"),
        ("idle_timeout_s = 0", "idle_timeout_s: got 0.0, expected a number of seconds more than 0"),
        ("idle_timeout_s = nan", "idle_timeout_s: got nan, expected a number of seconds more than 0"),
        ("max_wait_s = inf", "max_wait_s: got inf, expected a number of seconds more than 0"),
        ("max_chunks_ahead = 0", "max_chunks_ahead: got 0, expected 1 or more"),
        ("max_utilization = 1.5", "max_utilization: got 1.5, expected more than 0 and at most 1"),
        ("max_wait_s = 0", "max_wait_s: got 0.0, expected a number of seconds more than 0"),
        ("slots = ", "cannot be read as TOML"),
    ],
)
def test_wrong_settings_name_file_key_got_and_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ServeConfig.from_toml(path)
    assert str(path) in str(raised.value)


ALL = 'preset = "tiny"  # Größe 大小\nslots = 3\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_utf_8_is_read_with_and_without_a_byte_order_mark_in_every_locale(
    tmp_path: Path, encoding: str, newline: str
) -> None:
    path = tmp_path / "prüfung 大.toml"
    path.write_bytes(ALL.replace("\n", newline).encode(encoding))
    assert ServeConfig.from_toml(path).slots == 3
    plain = path.rename(tmp_path / "serve.toml")
    code = "from longlive_serve.config.serve_config import ServeConfig; "
    code += f"print(ServeConfig.from_toml({str(plain)!r}).slots)"
    speaks_ascii = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    # -S: an environment's own files may name folders in other letters, which such a Python does not even start with.
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=speaks_ascii, capture_output=True, text=True, check=True)
    assert done.stdout == "3\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ALL.encode("utf-16"), "cannot be read as TOML: got UTF-16 text, expected UTF-8; save it as UTF-8"),
        (ALL.encode("utf-32"), "got UTF-32 text, expected UTF-8"),
        (b"slots = 3\n# Gr\xf6\xdfe\n", "line 2: got the byte 0xf6, which is not UTF-8; save it as UTF-8"),
        (b'weights = "C:\\models\\new"', "in double quotes a backslash begins an escape: write 'C:\\folder' in single"),
        (
            b'weights = "C:\\new"',
            r"weights: got 'C:\new', expected a path without control characters; in double quotes",
        ),
        (b'[[lora]]\npath = "C:\\new"', r"lora, table 1 of 1: got 'C:\new', expected a path without control"),
        (b'slots = 1\nweights = "C:\\Users\\me"', "in double quotes a backslash begins an escape"),
    ],
)
def test_other_encodings_and_backslashes_get_a_hint(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ServeConfig.from_toml(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_backslashes_in_single_quotes_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(r"weights = 'a\new b'", encoding="utf-8")
    assert ServeConfig.from_toml(path).weights == str(tmp_path / r"a\new b")


def test_settings_that_are_written_are_read_back(tmp_path: Path) -> None:
    lora = (
        Adapter(path=tmp_path / "ü 'x' \"y\" \\ 大\N{GRINNING FACE}.pt", scale=1e-7),
        Adapter(path=tmp_path / "b", alpha=8.0),
    )
    config = ServeConfig(slots=3, lora=lora, weights=str(tmp_path / "a b"), require_session_token=True, max_wait_s=0.25)
    (tmp_path / "serve.toml").write_text(config.to_toml(), encoding="utf-8")
    assert ServeConfig.from_toml(tmp_path / "serve.toml") == config


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none.toml"))):
        ServeConfig.from_toml(tmp_path / "none.toml")


def test_presets_fit_together() -> None:
    for config in PRESETS.values():
        assert config.dit.text_dim == config.text_encoder.dim
        assert config.dit.channels == config.vae.z_dim
        assert config.dit.head_dim % 2 == 0
    full = PRESETS["longlive-1.3b"]
    assert full.tokens_per_frame == 1560
    assert full.video_size == (480, 832)
