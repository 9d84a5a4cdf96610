# SPDX-License-Identifier: Apache-2.0
"""A session serialized in a few megabytes, for another server with the same weights to continue.

Written and read by the engine; opaque to clients. The format is a SHA-256 checksum followed by a safetensors file, not
pickle, because a snapshot comes from a client and is not trusted. `ModelRunner.restore` rebuilds what it does not hold.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import json
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from longlive_serve.backends.device import AsyncD2HCopy
from longlive_serve.config.presets import ModelConfig, WindowConfig
from longlive_serve.engine.session import MAX_PENDING, NOW, Prompt, SeededNoise, Session, SinkChunk
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import MAX_PROMPT_BYTES
from longlive_serve.protocol.session_options import ON_SWITCH

VERSION = 3
SUM_BYTES = hashlib.sha256().digest_size
_PLAIN = ("global_sink", "on_switch", "first_cached", "next_chunk", "prompts")  # fields of Session


def copy_to_host(session: Session) -> dict[str, AsyncD2HCopy]:
    """Start copies of the snapshot's tensors, as of the last launched chunk. The noise must be a SeededNoise."""
    assert isinstance(session.noise, SeededNoise)
    assert session.context_latents, "there is no snapshot before the first chunk"
    tensors = {"recent": torch.cat(list(session.context_latents)), "noise": session.noise.state}
    if session.sink:
        tensors["sink"] = torch.cat([one.latents for one in session.sink])
    return {name: AsyncD2HCopy(tensor) for name, tensor in tensors.items()}


def dump(session: Session, model_config: ModelConfig) -> bytes:
    """The snapshot of `session` as bytes. Call it between two chunks."""
    return dump_later(session, model_config, copy_to_host(session))()


def dump_later(session: Session, model_config: ModelConfig, tensors: Mapping[str, AsyncD2HCopy]) -> Callable[[], bytes]:
    """Returns a function that serializes the current state. It may run in any thread and at any later time."""
    metadata = {
        "version": VERSION,
        "model": model_config.name,
        **{name: getattr(session, name) for name in _PLAIN},
        "token": _hashed(session.token),
        "prompt": dataclasses.asdict(session.prompt),
        "pending": [dataclasses.asdict(prompt) for prompt in session.pending],
        "sink": [{"chunk": one.chunk, "prompt": dataclasses.asdict(one.prompt)} for one in session.sink],
    }
    return functools.partial(_write, json.dumps(metadata), tensors)


def _write(metadata: str, tensors: Mapping[str, AsyncD2HCopy]) -> bytes:
    body = save({name: tensor.wait() for name, tensor in tensors.items()}, {"session": metadata})
    return hashlib.sha256(body).digest() + body


def load_session(
    data: bytes, session_id: str, token: str, model_config: ModelConfig, device: str, dtype: torch.dtype
) -> Session:
    """The session in a snapshot, under a new id. Raises RequestError: FORBIDDEN if `token` is not the session's,
    INVALID_REQUEST if `dump` did not write `data`."""
    body = data[SUM_BYTES:]
    if hashlib.sha256(body).digest() != data[:SUM_BYTES]:
        raise _invalid("its checksum is wrong: it is truncated or damaged, or not a snapshot")
    try:
        tensors, metadata = load(body), _read_metadata(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _invalid(f"it cannot be read ({error})") from None
    if metadata.get("version") != VERSION or metadata.get("model") != model_config.name:
        raise _invalid(
            f"got version {metadata.get('version')} and model {metadata.get('model')!r}, "
            f"expected version {VERSION} and {model_config.name!r}"
        )
    if not hmac.compare_digest(str(metadata.get("token")).encode(), _hashed(token).encode()):
        raise RequestError(
            RequestError.FORBIDDEN, "OPTIONS.session_token: got another, expected the token of the SNAPSHOT's session"
        )
    try:
        return _session(session_id, metadata, tensors, model_config, device, dtype)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise _invalid(f"it does not describe a session ({type(error).__name__}: {error})") from None


def _read_metadata(body: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file: the length of its header, then the header as JSON."""
    header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
    metadata = json.loads(header["__metadata__"]["session"])
    if not isinstance(metadata, dict):
        raise ValueError("the metadata is not a JSON object")
    return metadata


def _session(
    session_id: str,
    metadata: dict[str, Any],
    tensors: dict[str, Tensor],
    model_config: ModelConfig,
    device: str,
    dtype: torch.dtype,
) -> Session:
    shape = (
        model_config.window.chunk,
        model_config.dit.channels,
        model_config.latent_height,
        model_config.latent_width,
    )
    window = model_config.window

    def chunks(name: str, max_chunks: int) -> list[Tensor]:
        tensor = tensors[name].to(device, dtype)
        if tensor.shape[1:] != shape or not 1 <= len(tensor) <= max_chunks or not tensor.isfinite().all():
            raise ValueError(f"{name}: got {list(tensor.shape)}, expected up to {max_chunks} chunks of {list(shape)}")
        return list(tensor.split(1))

    context_latents = chunks("recent", window.window // window.chunk)
    sink = chunks("sink", window.sink // window.chunk) if metadata["sink"] else []
    noise = SeededNoise(0)
    noise.state = tensors["noise"]
    session = Session(
        id=session_id,
        prompt=_prompt(metadata["prompt"]),
        noise=noise,
        sink=[
            SinkChunk(chunk=_count(one["chunk"]), latents=latents, prompt=_prompt(one["prompt"]))
            for one, latents in zip(metadata["sink"], sink, strict=True)
        ],
        context_latents=deque(context_latents),
        pending=[_prompt(prompt) for prompt in metadata["pending"]],
        on_switch=str(metadata["on_switch"]),
        global_sink=bool(metadata["global_sink"]),
        first_cached=_count(metadata["first_cached"]),
        next_chunk=_count(metadata["next_chunk"]),
        prompts=_count(metadata["prompts"]),
    )
    _check(session, window)
    return session


def _check(session: Session, window: WindowConfig) -> None:
    """Raises ValueError if the parts are inconsistent: `restore` must write every block of the KV cache."""
    capacity, num_cached = window.window // window.chunk, session.next_chunk - session.first_cached
    if len(session.context_latents) != min(capacity, session.next_chunk) or num_cached < 0:
        raise ValueError(f"got {len(session.context_latents)} recent chunks before chunk {session.next_chunk}")
    if num_cached > capacity and len(session.sink) != window.sink // window.chunk:
        raise ValueError(f"got {len(session.sink)} chunks of the sink")
    if any(one.chunk >= session.next_chunk for one in session.sink):
        raise ValueError(f"got a sink chunk that is not before chunk {session.next_chunk}")
    if session.on_switch not in ON_SWITCH or len(session.pending) > MAX_PENDING:
        raise ValueError(f"got on_switch {session.on_switch!r} and {len(session.pending)} pending prompts")


def _prompt(fields: dict[str, Any]) -> Prompt:
    text, frame = str(fields["text"]), fields["at_latent_frame"]
    if not text.strip() or len(text.encode()) > MAX_PROMPT_BYTES:
        raise ValueError(f"got a prompt of {len(text)} characters")
    return Prompt(index=_count(fields["index"]), text=text, at_latent_frame=max(NOW, int(frame)))


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"got {value!r}, expected a count")
    return value


def _hashed(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _invalid(reason: str) -> RequestError:
    return RequestError(RequestError.INVALID_REQUEST, f"SNAPSHOT: {reason}")
