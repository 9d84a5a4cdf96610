# SPDX-License-Identifier: Apache-2.0
"""A gRPC server with Triton's protocol and scripted responses: the real wire without a model.

Its errors look like Triton's: with the request's id, without tensors, and with an optional prefix before the message.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor

from longlive_serve.protocol.messages import FrameChunk
from longlive_serve.protocol.session_options import Options

SIZE = (4, 6)  # height and width of a frame
DTYPES = {"INT64": np.int64, "INT32": np.int32, "UINT8": np.uint8}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Received:
    """A decoded request."""

    id: str
    session_id: str
    start: bool
    end: bool
    empty_final: bool
    tensors: dict[str, np.ndarray[Any, Any]]

    @property
    def prompt(self) -> str | None:
        return self.tensors["PROMPT"][0].decode() if "PROMPT" in self.tensors else None

    @property
    def chunks(self) -> int | None:
        return int(self.tensors["CHUNKS"][0]) if "CHUNKS" in self.tensors else None

    @property
    def snapshot(self) -> bytes | None:
        return self.tensors["SNAPSHOT"].tobytes() if "SNAPSHOT" in self.tensors else None

    @property
    def options(self) -> Options:
        return Options.from_json(self.tensors["OPTIONS"][0].decode() if "OPTIONS" in self.tensors else "{}")


class Conversation:
    """One stream: `next()` waits for the client's next request; `gone` is set on disconnect."""

    def __init__(self, requests: Iterator[Any], context: Any) -> None:
        self._requests = requests
        self.context = context
        self.gone = threading.Event()
        context.add_callback(self.gone.set)

    def next(self) -> Received:
        message = next(self._requests)
        tensors = {}
        for spec, raw in zip(message.inputs, message.raw_input_contents, strict=True):
            flat = (
                deserialize_bytes_tensor(raw) if spec.datatype == "BYTES" else np.frombuffer(raw, DTYPES[spec.datatype])
            )
            tensors[spec.name] = flat.reshape(list(spec.shape))
        parameters = message.parameters
        return Received(
            id=message.id,
            session_id=parameters["sequence_id"].string_param,
            start=parameters["sequence_start"].bool_param,
            end=parameters["sequence_end"].bool_param,
            empty_final=parameters["triton_enable_empty_final_response"].bool_param,
            tensors=tensors,
        )


Script = Callable[[Conversation], Iterator[Any]]


class ScriptedTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """Runs `script` for each stream and sends the yielded responses."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._server = grpc.server(ThreadPoolExecutor(16))
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self._server)
        self.url = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()

    def kill(self) -> None:
        """Break all streams."""
        self._server.stop(grace=None).wait()

    def ModelStreamInfer(self, request_iterator: Iterator[Any], context: Any) -> Iterator[Any]:  # noqa: N802
        # `next()` fails when the client closes its half of the stream; this ends the script.
        try:
            yield from self._script(Conversation(request_iterator, context))
        except RuntimeError as error:
            if not isinstance(error.__cause__, StopIteration):
                raise


def chunk(request: Received, index: int, *, final: bool = False, **fields: Any) -> Any:
    """Chunk number `index` of the video; its pixels are `index`."""
    first = 12 * index - 3 if index else 0
    frames = np.full((12 if index else 9, *SIZE, 3), index % 256, np.uint8)
    return _response(
        request, FrameChunk(frames=frames, first_frame=first, **({"prompt_index": 0, "seconds": 0.1} | fields)), final
    )


def acknowledgement(request: Received, *, final: bool = True, **fields: Any) -> Any:
    """A response without frames."""
    frames = np.zeros((0, *SIZE, 3), np.uint8)
    return _response(request, FrameChunk(frames=frames, first_frame=0, **({"prompt_index": 0} | fields)), final)


def final(request: Received) -> Any:
    """The empty final response."""
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.id = request.id
    response.infer_response.parameters["triton_final_response"].bool_param = True
    return response


def error(request: Received, text: str) -> Any:
    return service_pb2.ModelStreamInferResponse(error_message=text, infer_response={"id": request.id})


def _response(request: Received, content: FrameChunk, is_final: bool) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    answer = response.infer_response
    answer.id = request.id
    answer.parameters["triton_final_response"].bool_param = is_final
    for name, array in content.to_tensors().items():
        datatype = np_to_triton_dtype(array.dtype)
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        raw = serialize_byte_tensor(array).item() if datatype == "BYTES" else array.tobytes()
        answer.raw_output_contents.append(raw)
    return response


def well_behaved(conversation: Conversation) -> Iterator[Any]:
    """Responds like the real model to sequential requests: chunks, prompt switches, acknowledgements."""
    made, prompts, in_force = 0, 0, 0
    pending: list[tuple[int, int]] = []
    while True:
        request = conversation.next()
        if request.prompt is not None and not request.start:
            prompts += 1
            pending.append((request.options.at_latent_frame or 0, prompts))
        for _ in range(request.chunks or 0):
            if pending and 3 * made >= pending[0][0]:
                in_force = pending.pop(0)[1]
            yield chunk(request, made, prompt_index=in_force)
            made += 1
        if request.chunks is None:
            yield acknowledgement(request, prompt_index=prompts)
        else:
            yield final(request)


def recorded(script: Script, into: list[Received]) -> Script:
    """`script`, with all received requests appended to `into`."""

    def run(conversation: Conversation) -> Iterator[Any]:
        take = conversation.next

        def next_request() -> Received:
            into.append(take())
            return into[-1]

        conversation.next = next_request  # type: ignore[method-assign]
        yield from script(conversation)

    return run


Part = Callable[[Conversation, Received], Iterator[Any]]


class Sequel:
    """Runs one part per connection, in order; records the first request of each."""

    def __init__(self, *parts: Part) -> None:
        self._parts = iter(parts)
        self.starts: list[Received] = []

    def __call__(self, conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        self.starts.append(start)
        yield from next(self._parts)(conversation, start)


def breaks_after(*indices: int, snapshots: bool = True) -> Part:
    def part(conversation: Conversation, start: Received) -> Iterator[Any]:
        for index in indices:
            yield chunk(start, index, snapshot=f"after {index}".encode() if snapshots else b"")

    return part


def ends_after(*indices: int) -> Part:
    def part(conversation: Conversation, start: Received) -> Iterator[Any]:
        for index in indices:
            yield chunk(start, index, final=index == indices[-1])
        while True:
            yield acknowledgement(conversation.next())

    return part


def full(conversation: Conversation, start: Received) -> Iterator[Any]:
    """Refuses the session because no slot is free."""
    yield error(start, "[unavailable] no slot is free; try again in 30 s")
    yield error(conversation.next(), "[unknown_session] it has ended")
