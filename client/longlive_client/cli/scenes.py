# SPDX-License-Identifier: Apache-2.0
"""Scenes: the prompts of a video and their times, read from a JSONL file.

One video per line, in the reference's format, or with times (seconds) and other keys:

    {"prompts": ["A fox runs.", "The fox sleeps."]}
    {"prompts": [{"prompt": "A fox runs."}, {"prompt": "The fox sleeps.", "at": 7.5}], "name": "fox", "seconds": 20}
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longlive_serve.config.presets import FPS, FRAMES_PER_LATENT, WindowConfig
from longlive_serve.config.text_files import read_text
from longlive_serve.protocol.messages import MAX_PROMPT_BYTES

SWITCH_EVERY_S = 10.0
LATENTS_PER_CHUNK = WindowConfig().chunk
FRAMES_PER_CHUNK = LATENTS_PER_CHUNK * FRAMES_PER_LATENT
_FIRST_CHUNK_OFFSET = FRAMES_PER_LATENT - 1  # the first latent frame becomes one video frame
_KEYS = ("name", "prompts", "seconds", "seed")
_NAME = re.compile(r"\w[\w .,-]*")  # one path component, and not a hidden one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """One video: prompts in order; `prompts[i + 1]` begins at `switch_at[i]` seconds."""

    name: str
    prompts: tuple[str, ...]
    switch_at: tuple[float, ...] = ()
    seconds: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name: got {self.name!r}, expected letters, digits, spaces and . , _ - (a file name)")
        for prompt in self.prompts:
            _check_prompt(prompt)
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected a 64-bit integer")
        if len(self.switch_at) != len(self.prompts) - 1:
            raise ValueError(
                f"switch times: got {len(self.switch_at)} for {len(self.prompts)} prompts, "
                f"expected {len(self.prompts) - 1}"
            )
        self._check_times()

    def _check_times(self) -> None:
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ValueError(f"seconds: got {self.seconds}, expected more than 0")
        boundary = 0
        for at, frame in zip(self.switch_at, self.switch_latent_frames, strict=True):
            if -(-frame // LATENTS_PER_CHUNK) <= boundary:
                least = (boundary * LATENTS_PER_CHUNK + 1) * FRAMES_PER_LATENT / FPS
                raise ValueError(
                    f"switch times: got {list(self.switch_at)}, expected {at:g} to be at least {least:g}: "
                    "each prompt needs a chunk of its own"
                )
            boundary = -(-frame // LATENTS_PER_CHUNK)
        if self.chunks <= boundary:
            raise ValueError(
                f"seconds: got {self.seconds:g}, expected more than {self.switch_at[-1]:g}, when the last prompt begins"
            )

    @property
    def switch_latent_frames(self) -> tuple[int, ...]:
        return tuple(round(at * FPS / FRAMES_PER_LATENT) for at in self.switch_at)

    @property
    def chunks(self) -> int:
        """The smallest number of chunks that last `seconds`."""
        return max(1, math.ceil((FPS * self.seconds + _FIRST_CHUNK_OFFSET) / FRAMES_PER_CHUNK))


def default_seconds(switch_at: Sequence[float]) -> float:
    """One interval after the last switch."""
    return (switch_at[-1] if switch_at else 0.0) + SWITCH_EVERY_S


def load_scenes(
    path: Path | str, *, switch_at: Sequence[float] | None = None, seconds: float | None = None, seed: int = 0
) -> list[Scene]:
    """The scenes of a file. The arguments are defaults for its lines; the default name is `<file>-<line>`.

    Raises ValueError with the file, the line, what was got and what was expected.
    """
    path = Path(path)
    try:
        lines = read_text(path).split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    scenes: dict[str, Scene] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            scene = _scene(_object(line), f"{path.stem}-{number}", switch_at, seconds, seed)
            if scene.name in scenes:
                raise ValueError(f"name: got {scene.name!r} again, expected another one: each video is a file")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        scenes[scene.name] = scene
    if not scenes:
        raise ValueError(f"{path}: got no scenes, expected one JSON object per line")
    return list(scenes.values())


class RepeatedKeyError(ValueError):
    """Python's JSON parser silently takes the last of equal keys."""


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        key = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"{key}: got it {keys.count(key)} times, expected it once")
    return values


def _object(line: str) -> dict[str, Any]:
    try:
        values = json.loads(line, object_pairs_hook=_without_repeats)
    except RepeatedKeyError:
        raise
    except ValueError as error:
        raise ValueError(f"got {line.strip()[:60]!r}, expected a JSON object ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"got {line.strip()[:60]!r}, expected a JSON object")
    _check_keys(values, _KEYS)
    return values


def _scene(
    values: dict[str, Any], name: str, switch_at: Sequence[float] | None, seconds: float | None, seed: int
) -> Scene:
    entries = values.get("prompts")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"prompts: got {_format_value(entries)}, expected a list of at least one")
    for index, entry in enumerate(entries):
        if not isinstance(entry, str | dict):
            raise ValueError(
                f"prompts[{index}]: got {_format_value(entry)}, expected a string, or an object with 'prompt'"
            )
    if all(isinstance(entry, str) for entry in entries):
        prompts = entries
        times = [SWITCH_EVERY_S * i for i in range(1, len(prompts))] if switch_at is None else list(switch_at)
    elif all(isinstance(entry, dict) for entry in entries):
        prompts, times = _timed(entries)
    else:
        raise ValueError("prompts: got strings and objects mixed, expected all of one kind")
    length = _number(values["seconds"], "seconds") if "seconds" in values else seconds
    return Scene(
        name=_typed(values.get("name", name), str, "name"),
        prompts=tuple(prompts),
        switch_at=tuple(times),
        seconds=default_seconds(times) if length is None else length,
        seed=_typed(values.get("seed", seed), int, "seed"),
    )


def _timed(entries: list[dict[str, Any]]) -> tuple[list[str], list[float]]:
    prompts, times = [], []
    for index, entry in enumerate(entries):
        field = f"prompts[{index}]"
        _check_keys(entry, ("at", "prompt"), field)
        if "prompt" not in entry:
            raise ValueError(f"{field}: got no 'prompt', expected one")
        prompts.append(_typed(entry["prompt"], str, f"{field}.prompt"))
        if "at" not in entry and index > 0:
            raise ValueError(f"{field}: got no 'at', expected the time in seconds at which it begins")
        times.append(_number(entry.get("at", 0), f"{field}.at"))
    if times[0] != 0:
        raise ValueError(f"prompts[0].at: got {times[0]:g}, expected 0 or none: a video begins with its first prompt")
    return prompts, times[1:]


def _check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise ValueError("prompt: got an empty one, expected a description of the video")
    try:
        size = len(prompt.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: got {prompt[:60]!r}, expected text that UTF-8 can hold ({error.reason})") from None
    if size > MAX_PROMPT_BYTES:
        raise ValueError(f"prompt: got {size} bytes, expected at most {MAX_PROMPT_BYTES}")


def _check_keys(values: dict[str, Any], allowed: tuple[str, ...], field: str = "line") -> None:
    for key in values:
        if key not in allowed:
            raise ValueError(f"{field}: got unknown key {key!r}, expected some of {list(allowed)}")


def _typed(value: Any, expected: type, field: str) -> Any:
    if type(value) is not expected:
        raise ValueError(f"{field}: got {_format_value(value)}, expected {expected.__name__}")
    return value


def _number(value: Any, field: str) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1e9:
        raise ValueError(f"{field}: got {_format_value(value)}, expected a number of seconds, 0 or more")
    return float(value)


def _format_value(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:60]
