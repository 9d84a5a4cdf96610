# SPDX-License-Identifier: Apache-2.0
"""The scene format: what a line means, and what is said about a line that means nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_client.cli.scenes import Scene, load_scenes

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(tmp_path: Path, *lines: Any, **defaults: Any) -> list[Scene]:
    path = tmp_path / "film.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return load_scenes(path, **defaults)


def test_a_line_in_the_references_format_switches_every_ten_seconds(tmp_path: Path) -> None:
    (scene,) = load(tmp_path, {"prompts": ["a", "b", "c"]})
    assert scene == Scene(name="film-1", prompts=("a", "b", "c"), switch_at=(10, 20), seconds=30, seed=0)
    assert scene.switch_latent_frames == (40, 80)


def test_switch_times_length_and_seed_can_be_given_for_all_lines(tmp_path: Path) -> None:
    (scene,) = load(tmp_path, {"prompts": ["a", "b"]}, switch_at=[3.2], seconds=8, seed=4)
    assert (scene.switch_at, scene.seconds, scene.seed) == ((3.2,), 8, 4)
    assert scene.switch_latent_frames == (13,)


def test_a_line_with_times_of_its_own_keeps_them(tmp_path: Path) -> None:
    line = {"prompts": [{"prompt": "a", "at": 0}, {"prompt": "b", "at": 7.5}], "name": "x", "seconds": 9, "seed": -3}
    (scene,) = load(tmp_path, line, switch_at=[1, 2, 3], seconds=100, seed=4)
    assert scene == Scene(name="x", prompts=("a", "b"), switch_at=(7.5,), seconds=9, seed=-3)


def test_without_a_length_a_scene_lasts_ten_seconds_after_its_last_switch(tmp_path: Path) -> None:
    (scene, short) = load(tmp_path, {"prompts": [{"prompt": "a"}, {"prompt": "b", "at": 7.5}]}, {"prompts": ["a"]})
    assert (scene.seconds, short.seconds) == (17.5, 10)


def test_empty_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    scenes = load(tmp_path, "", {"prompts": ["a"]}, "  ", {"prompts": ["b"]}, "")
    assert [scene.name for scene in scenes] == ["film-2", "film-4"]


def test_characters_that_some_call_line_ends_do_not_end_a_line(tmp_path: Path) -> None:
    (scene,) = load(tmp_path, '{"prompts": ["a\u2028b"]}\r')
    assert scene.prompts == ("a\u2028b",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected a JSON object"),
        ("[]", "expected a JSON object"),
        ({}, "prompts: got nothing"),
        ({"prompts": []}, "at least one"),
        ({"prompts": "a"}, "expected a list"),
        ({"prompts": [""]}, "empty one"),
        ({"prompts": [1]}, r"prompts\[0\]: got 1, expected a string"),
        ({"prompts": ["a", {"prompt": "b", "at": 3}]}, "mixed"),
        ({"prompts": ["\ud800"]}, "UTF-8"),
        ({"prompts": ["x" * 70000]}, "70000 bytes"),
        ({"prompts": ["a"], "title": "x"}, "unknown key 'title'"),
        ({"prompts": [{"prompt": "a", "when": 0}]}, r"prompts\[0\]: got unknown key 'when'"),
        ({"prompts": [{"at": 0}]}, r"prompts\[0\]: got no 'prompt'"),
        ({"prompts": [{"prompt": 3}]}, r"prompts\[0\].prompt: got 3"),
        ({"prompts": [{"prompt": "a", "at": 1}]}, "begins with its first prompt"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b"}]}, r"prompts\[1\]: got no 'at'"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b", "at": "5"}]}, r"prompts\[1\].at: got '5'"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b", "at": True}]}, r"prompts\[1\].at: got True"),
        ('{"prompts": [{"prompt": "a"}, {"prompt": "b", "at": NaN}]}', r"prompts\[1\].at: got nan"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b", "at": 0.1}]}, "0.1 to be at least 0.25"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b", "at": 5}, {"prompt": "c", "at": 4}]}, "4 to be at least"),
        (
            {"prompts": [{"prompt": "a"}, {"prompt": "b", "at": 5}, {"prompt": "c", "at": 5.1}]},
            "5.1 to be at least 5.5",
        ),
        ({"prompts": ["a", "b"], "seconds": 5}, "expected more than 10, when the last prompt begins"),
        ({"prompts": ["a"], "seconds": 0}, "seconds: got 0"),
        ({"prompts": ["a"], "seconds": "9"}, "seconds: got '9'"),
        ({"prompts": ["a"], "seed": 1.5}, "seed: got 1.5"),
        ({"prompts": ["a"], "seed": 2**63}, "64-bit"),
        ({"prompts": ["a"], "name": "../a"}, "a file name"),
        ({"prompts": ["a"], "name": ".hidden"}, "a file name"),
        ({"prompts": ["a"], "name": "one"}, "got 'one' again"),
    ],
)
def test_a_malformed_line_is_named_with_what_was_got_and_expected(tmp_path: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, {"prompts": ["a"], "name": "one"}, "", line)
    assert str(caught.value).startswith(f"{tmp_path / 'film.jsonl'}, line 3: ")
    assert "expected" in str(caught.value)


def test_switch_times_must_fit_the_number_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="line 1: switch times: got 2 for 2 prompts, expected 1"):
        load(tmp_path, {"prompts": ["a", "b"]}, switch_at=[1, 2])


def test_a_file_that_is_missing_or_empty_or_not_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read"):
        load_scenes(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="got no scenes"):
        load(tmp_path, "", "")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"bytes\.jsonl: cannot be read"):
        load_scenes(tmp_path / "bytes.jsonl")


@given(st.floats(0.01, 1000))
def test_a_video_has_the_fewest_chunks_that_last_long_enough(seconds: float) -> None:
    chunks = Scene(name="x", prompts=("a",), seconds=seconds).chunks
    assert 9 + 12 * (chunks - 1) >= 16 * seconds
    assert chunks == 1 or 9 + 12 * (chunks - 2) < 16 * seconds


def test_the_examples_are_scenes() -> None:
    scenes = [scene for path in sorted(EXAMPLES.glob("*.jsonl")) for scene in load_scenes(path)]
    assert any(len(scene.prompts) == 4 for scene in scenes)


LINE = '{"prompts": ["größe 大"], "seconds": 1, "name": "n1"}\r\n'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "scenes.jsonl"
    path.write_bytes(LINE.encode(encoding))
    assert [scene.prompts for scene in load_scenes(path)] == [("größe 大",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LINE.encode("utf-16"), "cannot be read: got UTF-16 text, expected UTF-8; save it as UTF-8"),
        (b'{"prompts": ["a"], "seconds": 1, "seconds": 3}', "line 1: seconds: got it 2 times, expected it once"),
        (b'{"prompts": [{"prompt": "a", "prompt": "b"}]}', "line 1: prompt: got it 2 times, expected it once"),
    ],
)
def test_other_encodings_and_repeated_keys_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "scenes.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_scenes(path)
