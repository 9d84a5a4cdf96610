# SPDX-License-Identifier: Apache-2.0
"""The wire format: tensor names, requests and frame chunks, shared by the client and the Triton model.

Imported by the client, by `model.py` and by the engine. Needs only NumPy, neither torch nor Triton.

A session is one Triton sequence of the model `longlive`; its id is the sequence's correlation id (a string).

* START carries PROMPT, or SNAPSHOT to continue an interrupted session, on this server or another. It may carry SEED,
  CHUNKS (0 or absent: until stopped) and OPTIONS.
* Later requests may carry PROMPT (the new prompt), CHUNKS (that many more chunks, streamed as answers to this
  request), both, or nothing (a heartbeat).
* END together with CHUNKS ends the session after those chunks; END alone stops it at the next chunk boundary.
* A request for chunks (START is one) is answered by one response per chunk. Request a few at a time: Triton keeps all
  responses of a request in memory until the last one.
* Every other request is answered by one acknowledgement: the same tensors with no frames in FRAMES. The last response
  to any request is FINAL.
* START and END together with OPTIONS.command is a command, which belongs to no session; the answer is its NOTICE.
  `health`: `ready`, or why a new session would have to wait. `set_lora` (changes the LoRA adapters of new sessions):
  the adapters.
* With `stream_partial_chunks`, a chunk comes in parts, one per latent frame; CHUNK_SECONDS is 0 except in the last.
* With `format` `jpeg` or `h264`, FRAMES is empty and ENCODED holds the frames: JPEG images, or an H.264 stream (Annex
  B) that begins anew with each START.
* A START that waits for a slot is answered by responses without frames whose NOTICE holds its queue position. With
  OPTIONS.max_wait_s = 0 it is refused at once if there is no slot, so that the client can ask another server.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from longlive_serve.protocol.errors import invalid
from longlive_serve.protocol.session_options import HEALTH, SET_LORA, Options

MODEL_NAME = "longlive"
CLIENT_HEADER = "x-client-id"  # gRPC header: who the client is; set by a proxy
SESSION_HEADER = "x-session-id"  # gRPC header, for proxies that keep a session on one server
READY = "ready"  # the NOTICE of the command `health` if a new session would start at once
COMMAND_OPTIONS = {HEALTH: (), SET_LORA: ("adapters", "admin_token")}  # the options that each command takes
MAX_SNAPSHOT_BYTES = 64 * 1024 * 1024
MAX_PROMPT_BYTES = 64 * 1024  # far above text_len tokens; protects the tokenizer from hostile prompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor. `dtype` is KServe's name; -1 in `shape` is a variable size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


PROMPT = TensorSpec(name="PROMPT", dtype="BYTES", shape=(1,))  # UTF-8
SEED = TensorSpec(name="SEED", dtype="INT64", shape=(1,))
CHUNKS = TensorSpec(name="CHUNKS", dtype="INT32", shape=(1,))
OPTIONS = TensorSpec(name="OPTIONS", dtype="BYTES", shape=(1,))  # a JSON object; keys: `Options`
SNAPSHOT = TensorSpec(name="SNAPSHOT", dtype="UINT8", shape=(-1,))  # a session to continue; empty: none
INPUTS = (PROMPT, SEED, CHUNKS, OPTIONS, SNAPSHOT)  # all optional on the wire; START needs PROMPT or SNAPSHOT

FRAMES = TensorSpec(name="FRAMES", dtype="UINT8", shape=(-1, -1, -1, 3))  # [frames, height, width, RGB]
FIRST_FRAME = TensorSpec(name="FIRST_FRAME", dtype="INT64", shape=(1,))  # video frame number of FRAMES[0]
PROMPT_INDEX = TensorSpec(name="PROMPT_INDEX", dtype="INT32", shape=(1,))  # in force (ack: the accepted one)
CHUNK_SECONDS = TensorSpec(name="CHUNK_SECONDS", dtype="FP32", shape=(1,))  # time the chunk took; 0: more parts follow
ENCODED = TensorSpec(name="ENCODED", dtype="UINT8", shape=(-1,))  # frames in JPEG or H.264, concatenated
ENCODED_SIZES = TensorSpec(name="ENCODED_SIZES", dtype="INT32", shape=(-1,))  # bytes of each frame in ENCODED
NOTICE = TensorSpec(name="NOTICE", dtype="BYTES", shape=(1,))  # UTF-8; empty: none
OUTPUTS = (FRAMES, FIRST_FRAME, PROMPT_INDEX, CHUNK_SECONDS, NOTICE, SNAPSHOT, ENCODED, ENCODED_SIZES)

_NUMPY_DTYPES = {"INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8, "FP32": np.float32}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """One request of a session. `None` means that the tensor is absent."""

    session_id: str
    start: bool = False
    end: bool = False
    prompt: str | None = None
    seed: int | None = None
    chunks: int | None = None
    options: Options = dataclasses.field(default_factory=Options)
    snapshot: bytes | None = None
    client: str = ""
    """Who the client is (CLIENT_HEADER); empty: unknown."""

    @classmethod
    def from_tensors(
        cls, session_id: str, start: bool, end: bool, tensors: Mapping[str, np.ndarray[Any, Any]], client: str = ""
    ) -> Request:
        """The request that `tensors` (by wire name) describe. Raises RequestError INVALID_REQUEST."""
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
            snapshot=_bytes(tensors, SNAPSHOT, MAX_SNAPSHOT_BYTES),
            client=client,
        )
        request._check()
        return request

    def _check(self) -> None:
        if not self.session_id:
            raise invalid("session id: got none, expected a non-empty string as the sequence's correlation id")
        if self.options.command is not None:
            self._check_command(self.options.command)
            return
        for key in COMMAND_OPTIONS[SET_LORA]:
            if getattr(self.options, key) is not None:
                raise invalid(f"OPTIONS.{key}: got it without a command, expected the command {SET_LORA!r} with it")
        if self.prompt is not None and not self.prompt.strip():
            raise invalid("PROMPT: got an empty prompt, expected a description of the video")
        if self.chunks is not None and self.chunks < 0:
            raise invalid(f"CHUNKS: got {self.chunks}, expected 0 (until stopped) or more")
        if self.start and self.prompt is None and self.snapshot is None:
            raise invalid("START: got no PROMPT, expected one (or a SNAPSHOT)")
        if self.snapshot is not None:
            self._check_snapshot()
        if self.start and self.end and not self.chunks:
            raise invalid("START with END: got no CHUNKS, expected 1 or more (no later request could stop it)")
        if self.start and self.options.at_latent_frame is not None:
            raise invalid("OPTIONS.at_latent_frame: got it in START, expected it with the PROMPT of a later request")
        if self.prompt is None and self.options.at_latent_frame is not None:
            raise invalid("OPTIONS.at_latent_frame: got no PROMPT with it, expected one")
        if not self.start:
            self._check_after_start()

    def _check_command(self, command: str) -> None:
        if not (self.start and self.end):
            raise invalid(f"OPTIONS.command: got {command!r} without START and END, expected both")
        tensors = {"PROMPT": self.prompt, "SEED": self.seed, "CHUNKS": self.chunks, "SNAPSHOT": self.snapshot}
        for name, value in tensors.items():
            if value is not None:
                raise invalid(f"{name}: got it with the command {command!r}, expected no tensor but OPTIONS")
        for key in self.options.to_dict():
            if key not in ("command", *COMMAND_OPTIONS[command]):
                expected = " and ".join(COMMAND_OPTIONS[command]) or "no other option"
                raise invalid(f"OPTIONS.{key}: got it with the command {command!r}, expected {expected}")
        if command == SET_LORA and self.options.adapters is None:
            raise invalid(f"OPTIONS.adapters: got none with the command {command!r}, expected an object")

    def _check_after_start(self) -> None:
        if self.seed is not None:
            raise invalid("SEED: got it after START, expected it in START only")
        for key in self.options.to_dict():
            if key not in ("session_token", "at_latent_frame"):
                raise invalid(f"OPTIONS.{key}: got it after START, expected it in START only")

    def _check_snapshot(self) -> None:
        if not self.start:
            raise invalid("SNAPSHOT: got it after START, expected it in START only")
        fields = {"PROMPT": self.prompt, "SEED": self.seed}
        fields |= {f"OPTIONS.{key}": getattr(self.options, key) for key in ("global_sink", "on_switch")}
        for name, value in fields.items():
            if value is not None:
                raise invalid(f"{name}: got it with a SNAPSHOT, expected none: the snapshot has its own")

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
        if self.snapshot is not None:
            tensors[SNAPSHOT.name] = np.frombuffer(self.snapshot, np.uint8)
        return tensors


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameChunk:
    """The frames of one chunk (12; 9 in the first chunk) or of a part of it; none in an acknowledgement."""

    frames: np.ndarray[Any, Any]  # uint8 [frames, height, width, 3]
    first_frame: int
    prompt_index: int
    seconds: float = 0.0
    notice: str = ""
    snapshot: bytes = b""
    encoded: tuple[bytes, ...] = ()
    """The frames as JPEG or H.264, one entry each; `frames` is then empty."""

    @property
    def completes(self) -> bool:
        """Whether these are the last frames of a chunk."""
        return self.seconds > 0

    def to_tensors(self) -> dict[str, np.ndarray[Any, Any]]:
        return {
            FRAMES.name: self.frames,
            FIRST_FRAME.name: np.array([self.first_frame], np.int64),
            PROMPT_INDEX.name: np.array([self.prompt_index], np.int32),
            CHUNK_SECONDS.name: np.array([self.seconds], np.float32),
            NOTICE.name: _bytes_array(self.notice),
            SNAPSHOT.name: np.frombuffer(self.snapshot, np.uint8),
            ENCODED.name: np.frombuffer(b"".join(self.encoded), np.uint8),
            ENCODED_SIZES.name: np.array([len(frame) for frame in self.encoded], np.int32),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, np.ndarray[Any, Any]]) -> FrameChunk:
        ends = np.cumsum(tensors[ENCODED_SIZES.name])
        return cls(
            frames=tensors[FRAMES.name],
            first_frame=int(tensors[FIRST_FRAME.name][0]),
            prompt_index=int(tensors[PROMPT_INDEX.name][0]),
            seconds=float(tensors[CHUNK_SECONDS.name][0]),
            notice=tensors[NOTICE.name][0].decode(),
            snapshot=tensors[SNAPSHOT.name].tobytes(),
            encoded=tuple(part.tobytes() for part in np.split(tensors[ENCODED.name], ends[:-1])) if len(ends) else (),
        )


def _bytes_array(text: str) -> np.ndarray[Any, Any]:
    return np.array([text.encode()], dtype=np.object_)


def _single(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec) -> Any:
    array = tensors.get(spec.name)
    if array is None:
        return None
    if tuple(array.shape) != spec.shape:
        raise invalid(f"{spec.name}: got shape {list(array.shape)}, expected {list(spec.shape)}")
    expected = _NUMPY_DTYPES.get(spec.dtype, np.object_)
    if array.dtype != expected:
        raise invalid(f"{spec.name}: got dtype {array.dtype}, expected {spec.dtype}")
    return array[0]


def _integer(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec) -> int | None:
    value = _single(tensors, spec)
    return None if value is None else int(value)


def _bytes(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec, limit: int) -> bytes | None:
    array = tensors.get(spec.name)
    if array is None:
        return None
    if array.ndim != 1 or array.dtype != _NUMPY_DTYPES[spec.dtype] or array.size > limit:
        dtype_shape = f"{array.dtype} {list(array.shape)}"
        raise invalid(
            f"{spec.name}: got {dtype_shape}, expected {spec.dtype} {list(spec.shape)} of at most {limit} bytes"
        )
    return array.tobytes()


def _text(tensors: Mapping[str, np.ndarray[Any, Any]], spec: TensorSpec, limit: int) -> str | None:
    value = _single(tensors, spec)
    if value is None:
        return None
    if len(value) > limit:
        raise invalid(f"{spec.name}: got {len(value)} bytes, expected at most {limit}")
    try:
        return str(value.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise invalid(f"{spec.name}: got bytes that are not UTF-8 ({error}), expected UTF-8 text") from None
