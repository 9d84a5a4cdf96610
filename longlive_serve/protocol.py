# SPDX-License-Identifier: Apache-2.0
"""The wire: tensor names, requests, frame chunks and errors, as the client and the Triton model both see them.

Imported by the client, by `model.py` and by the service. NumPy only: it knows neither torch nor Triton.

A session is one Triton sequence of the model `longlive`; its id is the sequence's correlation id (a string).

* START carries PROMPT, and may carry SEED, CHUNKS (0 or absent: until stopped) and OPTIONS.
* Later requests may carry PROMPT (the new prompt), CHUNKS (that many more chunks, streamed as answers to this
  request), both, or nothing (a heartbeat).
* END together with CHUNKS ends the session after those chunks; END alone stops it at the next chunk border.
* A request that asks for chunks (START does) is answered by one response per chunk; every other request is
  answered by one acknowledgement: the same tensors with no frames in FRAMES. The last response is FINAL.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

MODEL_NAME = "longlive"
RECACHE, KEEP, CLEAR = ON_SWITCH = ("recache", "keep", "clear")
MAX_PROMPT_BYTES = 64 * 1024  # far above text_len tokens; keeps a hostile prompt out of the tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor of the wire. `dtype` is KServe's name; -1 in `shape` is a size that varies."""

    name: str
    dtype: str
    shape: tuple[int, ...]


PROMPT = TensorSpec(name="PROMPT", dtype="BYTES", shape=(1,))  # UTF-8
SEED = TensorSpec(name="SEED", dtype="INT64", shape=(1,))
CHUNKS = TensorSpec(name="CHUNKS", dtype="INT32", shape=(1,))
OPTIONS = TensorSpec(name="OPTIONS", dtype="BYTES", shape=(1,))  # a JSON object; keys: `Options`
INPUTS = (PROMPT, SEED, CHUNKS, OPTIONS)  # all optional on the wire; START needs PROMPT

FRAMES = TensorSpec(name="FRAMES", dtype="UINT8", shape=(-1, -1, -1, 3))  # [frames, height, width, RGB]
FIRST_FRAME = TensorSpec(name="FIRST_FRAME", dtype="INT64", shape=(1,))  # video frame number of FRAMES[0]
PROMPT_INDEX = TensorSpec(name="PROMPT_INDEX", dtype="INT32", shape=(1,))  # in force (ack: the one accepted)
CHUNK_SECONDS = TensorSpec(name="CHUNK_SECONDS", dtype="FP32", shape=(1,))  # time the chunk took to generate
NOTICE = TensorSpec(name="NOTICE", dtype="BYTES", shape=(1,))  # UTF-8, empty when there is nothing to say
OUTPUTS = (FRAMES, FIRST_FRAME, PROMPT_INDEX, CHUNK_SECONDS, NOTICE)

_NUMPY_DTYPES = {"INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8, "FP32": np.float32}


class ServeError(Exception):
    """An error that crosses the wire as `[kind] message`; the client raises it again under the same kind."""

    INVALID_REQUEST: ClassVar[str] = "invalid_request"
    UNKNOWN_SESSION: ClassVar[str] = "unknown_session"
    SESSION_EXISTS: ClassVar[str] = "session_exists"
    FRAME_LIMIT: ClassVar[str] = "frame_limit"
    CANCELLED: ClassVar[str] = "cancelled"
    SHUTTING_DOWN: ClassVar[str] = "shutting_down"
    INTERNAL: ClassVar[str] = "internal"

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"[{kind}] {message}")
        self.kind = kind
        self.message = message

    @classmethod
    def parse(cls, text: str) -> ServeError:
        """The error that `text` (an error message off the wire) carries; INTERNAL when it is not one of ours."""
        kinds = {value for name, value in vars(ServeError).items() if name.isupper()}
        found = re.search(rf"\[({'|'.join(sorted(kinds))})\] (.*)", text, re.DOTALL)  # Triton may put words before it
        if found:
            return cls(found[1], found[2])
        if "must specify the START flag" in text:  # Triton's own words: it knows no such sequence
            return cls(cls.UNKNOWN_SESSION, text)
        return cls(cls.INTERNAL, text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of the OPTIONS object."""

    global_sink: bool | None = None
    """START only: a recache keeps the sink of the first prompt (the reference's default) or renews it."""
    on_switch: str | None = None
    """START only: what a prompt switch does to the KV cache. `recache` (the default) rebuilds it under the new prompt,
    `keep` goes on with the old one, `clear` drops it: the three ways that the paper compares."""
    at_latent_frame: int | None = None
    """With PROMPT in a later request: the prompt waits for the first chunk that starts at or after this frame."""

    @classmethod
    def from_json(cls, text: str) -> Options:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise _invalid(f"OPTIONS: got {text[:80]!r}, expected a JSON object ({error})") from None
        if not isinstance(values, dict):
            raise _invalid(f"OPTIONS: got {type(values).__name__}, expected a JSON object")
        expected = {"global_sink": bool, "on_switch": str, "at_latent_frame": int}
        for key, value in values.items():
            if key not in expected:
                raise _invalid(f"OPTIONS: got unknown key {key!r}, expected some of {sorted(expected)}")
            if type(value) is not expected[key]:
                raise _invalid(f"OPTIONS.{key}: got {value!r}, expected {expected[key].__name__}")
        options = cls(**values)
        if options.on_switch not in (None, *ON_SWITCH):
            raise _invalid(f"OPTIONS.on_switch: got {options.on_switch!r}, expected one of {list(ON_SWITCH)}")
        if options.at_latent_frame is not None and options.at_latent_frame < 0:
            raise _invalid(f"OPTIONS.at_latent_frame: got {options.at_latent_frame}, expected 0 or more")
        return options

    def to_json(self) -> str:
        return json.dumps({k: v for k, v in dataclasses.asdict(self).items() if v is not None})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request of a session, checked. `None` means that the tensor was absent."""

    session_id: str
    start: bool = False
    end: bool = False
    prompt: str | None = None
    seed: int | None = None
    chunks: int | None = None
    options: Options = Options()

    @classmethod
    def from_tensors(
        cls, session_id: str, start: bool, end: bool, tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> Request:
        """The request that `tensors` (by wire name) describe. Raises ServeError INVALID_REQUEST."""
        prompt = _text(tensors, PROMPT, MAX_PROMPT_BYTES)
        options = _text(tensors, OPTIONS, MAX_PROMPT_BYTES)
        request = cls(
            session_id=session_id,
            start=start,
            end=end,
            prompt=prompt,
            seed=_integer(tensors, SEED),
            chunks=_integer(tensors, CHUNKS),
            options=Options() if options is None else Options.from_json(options),
        )
        request._check()
        return request

    def _check(self) -> None:
        if not self.session_id:
            raise _invalid("session id: got none, expected a non-empty string as the sequence's correlation id")
        if self.prompt is not None and not self.prompt.strip():
            raise _invalid("PROMPT: got an empty prompt, expected a description of the video")
        if self.chunks is not None and self.chunks < 0:
            raise _invalid(f"CHUNKS: got {self.chunks}, expected 0 (until stopped) or more")
        if self.start and self.prompt is None:
            raise _invalid("START: got no PROMPT, expected one")
        if self.start and self.end and not self.chunks:
            raise _invalid("START with END: got no CHUNKS, expected 1 or more (nothing could stop it)")
        if self.start and self.options.at_latent_frame is not None:
            raise _invalid("OPTIONS.at_latent_frame: got it in START, expected it with the PROMPT of a later request")
        if self.prompt is None and self.options.at_latent_frame is not None:
            raise _invalid("OPTIONS.at_latent_frame: got no PROMPT with it, expected one")
        if not self.start and self.seed is not None:
            raise _invalid("SEED: got it after START, expected it in START only")
        for key in ("global_sink", "on_switch"):
            if not self.start and getattr(self.options, key) is not None:
                raise _invalid(f"OPTIONS.{key}: got it after START, expected it in START only")

    def to_tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        """The tensors to send, by wire name; only those that are set."""
        tensors: dict[str, np.ndarray[Any, Any]] = {}
        if self.prompt is not None:
            tensors[PROMPT.name] = _bytes_array(self.prompt)
        if self.seed is not None:
            tensors[SEED.name] = np.array([self.seed], np.int64)
        if self.chunks is not None:
            tensors[CHUNKS.name] = np.array([self.chunks], np.int32)
        if self.options != Options():
            tensors[OPTIONS.name] = _bytes_array(self.options.to_json())
        return tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameChunk:
    """The frames of one chunk: 12 of them, 9 in the first chunk, 0 in an acknowledgement."""

    frames: np.ndarray[Any, Any]  # uint8 [frames, height, width, 3]
    first_frame: int
    prompt_index: int
    seconds: float = 0.0
    notice: str = ""

    def to_tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        return {
            FRAMES.name: self.frames,
            FIRST_FRAME.name: np.array([self.first_frame], np.int64),
            PROMPT_INDEX.name: np.array([self.prompt_index], np.int32),
            CHUNK_SECONDS.name: np.array([self.seconds], np.float32),
            NOTICE.name: _bytes_array(self.notice),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray[Any, Any]]) -> FrameChunk:
        return cls(
            frames=tensors[FRAMES.name],
            first_frame=int(tensors[FIRST_FRAME.name][0]),
            prompt_index=int(tensors[PROMPT_INDEX.name][0]),
            seconds=float(tensors[CHUNK_SECONDS.name][0]),
            notice=tensors[NOTICE.name][0].decode(),
        )


def _invalid(message: str) -> ServeError:
    return ServeError(ServeError.INVALID_REQUEST, message)


def _bytes_array(text: str) -> np.ndarray[Any, Any]:
    return np.array([text.encode()], dtype=np.object_)


def _single(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec) -> Any:
    array = tensors.get(spec.name)
    if array is None:
        return None
    if tuple(array.shape) != spec.shape:
        raise _invalid(f"{spec.name}: got shape {list(array.shape)}, expected {list(spec.shape)}")
    expected = _NUMPY_DTYPES.get(spec.dtype, np.object_)
    if array.dtype != expected:
        raise _invalid(f"{spec.name}: got dtype {array.dtype}, expected {spec.dtype}")
    return array[0]


def _integer(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec) -> int | None:
    value = _single(tensors, spec)
    return None if value is None else int(value)


def _text(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec, limit: int) -> str | None:
    value = _single(tensors, spec)
    if value is None:
        return None
    if len(value) > limit:
        raise _invalid(f"{spec.name}: got {len(value)} bytes, expected at most {limit}")
    try:
        return str(value.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _invalid(f"{spec.name}: got bytes that are not UTF-8 ({error}), expected UTF-8 text") from None
