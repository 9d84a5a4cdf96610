# SPDX-License-Identifier: Apache-2.0
"""serve.toml: what is accepted, what is refused and how."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from longlive_serve.config import PRESETS, RANDOM_WEIGHTS, ServeConfig
from longlive_serve.weights import DIT_FILE

SHIPPED = Path(__file__).parents[1] / "model_repository/longlive/1/serve.toml"


def test_the_shipped_settings_serve_the_demo_network() -> None:
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
        ("idle_timeout_s = 0", "idle_timeout_s: got 0.0, expected more than 0"),
        ("lead = 0", "lead: got 0, expected 1 or more"),
        ("headroom = 1.5", "headroom: got 1.5, expected more than 0 and at most 1"),
        ("max_wait_s = 0", "max_wait_s: got 0.0, expected more than 0"),
        ("slots = ", "cannot be read as TOML"),
    ],
)
def test_wrong_settings_name_file_key_got_and_expected(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        ServeConfig.from_toml(path)
    assert str(path) in str(raised.value)


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
