# SPDX-License-Identifier: Apache-2.0
"""The OPTIONS of a request: what a session can choose. Part of the wire format; no NumPy, no tensors."""

from __future__ import annotations

import dataclasses
import json
import math

from longlive_serve.protocol.errors import invalid

HEALTH, SET_LORA = COMMANDS = ("health", "set_lora")
RECACHE, KEEP, CLEAR = ON_SWITCH = ("recache", "keep", "clear")
REALTIME, ASAP = PACES = ("realtime", "asap")
RAW, JPEG, H264 = FORMATS = ("raw", "jpeg", "h264")
MAX_FPS = 120
MAX_SCALE = 100.0  # of an adapter
TOKEN_LENGTHS = (16, 256)  # characters, at least and at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of the OPTIONS object."""

    command: str | None = None
    """START and END together: a command, which belongs to no session. `health` reports whether a new session would
    start at once, `set_lora` changes the LoRA adapters of new sessions."""
    global_sink: bool | None = None
    """START only: a recache keeps the sink of the first prompt (the reference's default) or renews it."""
    on_switch: str | None = None
    """START only: what a prompt switch does to the KV cache. `recache` (the default) rebuilds it under the new prompt,
    `keep` continues with the old one, `clear` drops it: the three methods that the paper compares."""
    pace: str | None = None
    """START only: `realtime` (the default) keeps to a playback clock, a little ahead of it; `asap` uses the time that
    live sessions leave."""
    fps: int | None = None
    """START only: frames per second of the playback clock (default: 16)."""
    snapshot_every: int | None = None
    """START only: number of chunks between SNAPSHOTs of the session (default: none are sent)."""
    format: str | None = None
    """START only: how frames are sent: `raw` (the default), `jpeg` or `h264`."""
    stream_partial_chunks: bool | None = None
    """START only: send a chunk's frames as soon as each latent frame is decoded (default: the chunk at once)."""
    max_wait_s: float | None = None
    """START only: maximum wait for a slot; the smaller of this and the server's `max_wait_s` counts. 0: be refused at
    once if there is no slot."""
    session_token: str | None = None
    """A secret of the client. Later requests of the session must repeat the token of START, and so must a START with
    its snapshot."""
    at_latent_frame: int | None = None
    """With PROMPT after START: it takes effect with the first chunk that starts at or after this latent frame."""
    adapters: dict[str, float] | None = None
    """With the command `set_lora`: adapter files by name, with their scales."""
    admin_token: str | None = None
    """With the command `set_lora`: the `admin_token` of the server's settings."""

    @classmethod
    def from_json(cls, text: str) -> Options:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise invalid(f"OPTIONS: got {text[:80]!r}, expected a JSON object ({error})") from None
        if not isinstance(values, dict):
            raise invalid(f"OPTIONS: got {type(values).__name__}, expected a JSON object")
        types: dict[str, tuple[type, ...]] = dict.fromkeys(
            ("command", "on_switch", "pace", "format", "session_token", "admin_token"), (str,)
        )
        types |= dict.fromkeys(("global_sink", "stream_partial_chunks"), (bool,))
        types |= dict.fromkeys(("fps", "snapshot_every", "at_latent_frame"), (int,))
        types |= {"max_wait_s": (int, float), "adapters": (dict,)}
        for key, value in values.items():
            if key not in types:
                raise invalid(f"OPTIONS: got unknown key {key!r}, expected some of {sorted(types)}")
            if type(value) not in types[key]:
                raise invalid(f"OPTIONS.{key}: got {value!r}, expected {' or '.join(k.__name__ for k in types[key])}")
        options = cls(**values)
        options._check()
        return options

    def _check(self) -> None:
        """Raises RequestError INVALID_REQUEST for a value of the right type that is out of range."""
        for key, choices in (("command", COMMANDS), ("on_switch", ON_SWITCH), ("pace", PACES), ("format", FORMATS)):
            if getattr(self, key) not in (None, *choices):
                raise invalid(f"OPTIONS.{key}: got {getattr(self, key)!r}, expected one of {list(choices)}")
        for key, min_value, max_value in (
            ("fps", 1, MAX_FPS),
            ("snapshot_every", 1, None),
            ("at_latent_frame", 0, None),
        ):
            number = getattr(self, key)
            if number is not None and not min_value <= number <= (number if max_value is None else max_value):
                expected_range = f"{min_value} or more" if max_value is None else f"{min_value} to {max_value}"
                raise invalid(f"OPTIONS.{key}: got {number}, expected {expected_range}")
        if self.max_wait_s is not None and not 0 <= self.max_wait_s < math.inf:
            raise invalid(f"OPTIONS.max_wait_s: got {self.max_wait_s}, expected a finite number, 0 or more")
        if self.session_token is not None and not TOKEN_LENGTHS[0] <= len(self.session_token) <= TOKEN_LENGTHS[1]:
            expected_length = f"{TOKEN_LENGTHS[0]} to {TOKEN_LENGTHS[1]}"
            raise invalid(
                f"OPTIONS.session_token: got {len(self.session_token)} characters, expected {expected_length}"
            )
        for name, scale in (self.adapters or {}).items():
            if type(scale) not in (int, float) or not -MAX_SCALE <= scale <= MAX_SCALE:
                raise invalid(f"OPTIONS.adapters.{name}: got {scale!r}, expected a scale, magnitude <= {MAX_SCALE:g}")

    def to_dict(self) -> dict[str, object]:
        """The options that are set, by key."""
        return {key: value for key, value in vars(self).items() if value is not None}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())
