# SPDX-License-Identifier: Apache-2.0
"""The wire: what a request may say, and that every refusal names got and expected."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import MAX_PROMPT_BYTES, FrameChunk, Request
from longlive_serve.protocol.session_options import Options


def text(value: str | bytes) -> np.ndarray[Any, Any]:
    return np.array([value if isinstance(value, bytes) else value.encode()], np.object_)


HEALTH = text('{"command": "health"}')
BOTH = {"start": True, "end": True}


def read(tensors: dict[str, Any], *, start: bool = True, end: bool = False, session_id: str = "s") -> Request:
    return Request.from_tensors(session_id, start, end, tensors)


def test_a_request_survives_the_wire() -> None:
    options = Options(global_sink=False, max_wait_s=0)
    request = Request(session_id="s", start=True, prompt="a fox — здесь", seed=-3, chunks=0, options=options)
    assert read(request.to_tensors()) == request
    assert Options.from_json('{"max_wait_s": 2.5}') == Options(max_wait_s=2.5)
    later = Request(session_id="s", prompt="the fox sleeps", options=Options(at_latent_frame=40))
    assert read(later.to_tensors(), start=False) == later
    assert read({}, start=False) == Request(session_id="s")
    command = Options(command="set_lora", adapters={"a.pt": 1.0}, admin_token="t" * 16)
    assert read({"OPTIONS": text(command.to_json())}, end=True).options == command


@pytest.mark.parametrize(
    ("tensors", "how", "message"),
    [
        ({}, {}, "START: got no PROMPT, expected one"),
        ({"PROMPT": text("  \n")}, {}, "PROMPT: got an empty prompt"),
        ({"PROMPT": text(b"\xff\xfe")}, {}, "PROMPT: got bytes that are not UTF-8"),
        (
            {"PROMPT": text("x" * (MAX_PROMPT_BYTES + 1))},
            {},
            f"PROMPT: got {MAX_PROMPT_BYTES + 1} bytes, expected at most",
        ),
        ({"PROMPT": np.array([b"a", b"b"], np.object_)}, {}, "PROMPT: got shape [2], expected [1]"),
        ({"PROMPT": np.array([5], np.int32)}, {}, "PROMPT: got dtype int32, expected BYTES"),
        (
            {"PROMPT": text("a"), "CHUNKS": np.array([-1], np.int32)},
            {},
            "CHUNKS: got -1, expected 0 (until stopped) or",
        ),
        ({"PROMPT": text("a"), "CHUNKS": np.array([1], np.int64)}, {}, "CHUNKS: got dtype int64, expected INT32"),
        ({"PROMPT": text("a")}, {"end": True}, "START with END: got no CHUNKS, expected 1 or more"),
        ({"PROMPT": text("a")}, {"session_id": ""}, "session id: got none"),
        ({"PROMPT": text("a"), "OPTIONS": text("{")}, {}, "OPTIONS: got '{', expected a JSON object"),
        ({"PROMPT": text("a"), "OPTIONS": text("[]")}, {}, "OPTIONS: got list, expected a JSON object"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"speed": 3}')}, {}, "OPTIONS: got unknown key 'speed', expected"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"fps": 0}')}, {}, "OPTIONS.fps: got 0, expected 1 to 120"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"pace": "fast"}')}, {}, "OPTIONS.pace: got 'fast', expected one of"),
        ({"OPTIONS": text('{"pace": "asap"}')}, {"start": False}, "OPTIONS.pace: got it after START"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"global_sink": 1}')}, {}, "OPTIONS.global_sink: got 1, expected bool"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"max_wait_s": "1"}')}, {}, "max_wait_s: got '1', expected int or"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"max_wait_s": true}')}, {}, "max_wait_s: got True, expected int or"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"max_wait_s": -1}')}, {}, "OPTIONS.max_wait_s: got -1, expected a"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"max_wait_s": NaN}')}, {}, "max_wait_s: got nan, expected a finite"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"max_wait_s": 1e999}')}, {}, "max_wait_s: got inf, expected a finite"),
        ({"OPTIONS": text('{"max_wait_s": 0}')}, {"start": False}, "OPTIONS.max_wait_s: got it after START"),
        (
            {"PROMPT": text("a"), "OPTIONS": text('{"on_switch": "x"}')},
            {},
            "OPTIONS.on_switch: got 'x', expected",
        ),
        ({"PROMPT": text("a"), "OPTIONS": text('{"at_latent_frame": 3}')}, {}, "at_latent_frame: got it in START"),
        ({"PROMPT": text("a"), "OPTIONS": text('{"at_latent_frame": -3}')}, {"start": False}, "got -3, expected 0 or"),
        ({"OPTIONS": text('{"at_latent_frame": 3}')}, {"start": False}, "at_latent_frame: got no PROMPT with it"),
        ({"SNAPSHOT": np.zeros(4, np.uint8), "PROMPT": text("a")}, {}, "PROMPT: got it with a SNAPSHOT"),
        ({"SNAPSHOT": np.zeros((2, 2), np.uint8)}, {}, "SNAPSHOT: got uint8 [2, 2], expected UINT8 [-1]"),
        ({"SNAPSHOT": np.zeros(4, np.uint8)}, {"start": False}, "SNAPSHOT: got it after START"),
        (
            {"OPTIONS": text('{"command": "stop"}')},
            BOTH,
            "OPTIONS.command: got 'stop', expected one of ['health', ",
        ),
        ({"OPTIONS": text('{"command": "health"}')}, {}, "command: got 'health' without START and END, expected both"),
        (
            {"OPTIONS": HEALTH, "SEED": np.array([1], np.int64)},
            BOTH,
            "SEED: got it with the command 'health', exp",
        ),
        (
            {"OPTIONS": text('{"command": "health", "fps": 9}')},
            BOTH,
            "OPTIONS.fps: got it with the command 'health'",
        ),
        ({"OPTIONS": text('{"command": "set_lora"}')}, BOTH, "OPTIONS.adapters: got none with the command 'set_lora'"),
        ({"OPTIONS": text('{"adapters": {}}')}, BOTH, "OPTIONS.adapters: got it without a command, expected the comm"),
        ({}, BOTH, "START: got no PROMPT, expected one"),
        ({"SEED": np.array([1], np.int64)}, {"start": False}, "SEED: got it after START"),
        ({"OPTIONS": text('{"global_sink": true}')}, {"start": False}, "OPTIONS.global_sink: got it after START"),
    ],
)
def test_a_wrong_request_is_refused(tensors: dict[str, Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)) as raised:
        read(tensors, **how)
    assert raised.value.kind == RequestError.INVALID_REQUEST


@given(
    st.dictionaries(st.sampled_from(["PROMPT", "OPTIONS", "SEED", "CHUNKS"]), st.binary()), st.booleans(), st.booleans()
)
def test_arbitrary_bytes_are_read_or_refused(values: dict[str, bytes], start: bool, end: bool) -> None:
    with contextlib.suppress(RequestError):
        read({name: text(value) for name, value in values.items()}, start=start, end=end)


def test_a_chunk_survives_the_wire() -> None:
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    chunk = FrameChunk(frames=frames, first_frame=9, prompt_index=1, seconds=0.25, notice="truncated - 600")
    got = FrameChunk.from_tensors(chunk.to_tensors())
    assert np.array_equal(got.frames, frames)
    assert (got.first_frame, got.prompt_index, got.seconds, got.notice) == (9, 1, 0.25, "truncated - 600")


def test_errors_keep_their_kind_over_the_wire() -> None:
    error = RequestError(RequestError.FRAME_LIMIT, "got [1] too many")
    assert RequestError.parse(str(error)).kind == RequestError.FRAME_LIMIT
    assert RequestError.parse(str(error)).message == "got [1] too many"
    assert RequestError.parse("something else").kind == RequestError.INTERNAL
    triton = "inference request for sequence 'x' to model 'longlive' must specify the START flag on the first request"
    assert RequestError.parse(triton).kind == RequestError.UNKNOWN_SESSION
