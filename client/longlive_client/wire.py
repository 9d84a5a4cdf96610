# SPDX-License-Identifier: Apache-2.0
"""Converts between Triton's gRPC messages and the tensors of `longlive_serve.protocol.messages`. No I/O.

The messages are built here and not by tritonclient's stream classes, because those drop the request id of an
error response, and the asyncio one cannot ask for empty final responses.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tritonclient.grpc import InferResult, service_pb2
from tritonclient.utils import np_to_triton_dtype, serialize_byte_tensor

from longlive_serve.protocol import messages
from longlive_serve.protocol.messages import FrameChunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class StreamedChunk(FrameChunk):
    """A received chunk (with `stream_partial_chunks`, a part of one). Without frames it carries only a notice."""

    arrived: float  # time.monotonic() when it was received


def new_session_id() -> str:
    """A random id of 128 bits in hexadecimal, which others cannot guess."""
    return secrets.token_hex(16)


def infer_request(
    session_id: str,
    request_id: str,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    *,
    start: bool = False,
    end: bool = False,
) -> Any:
    """The ModelInferRequest that carries `tensors`. They are not checked."""
    message = service_pb2.ModelInferRequest(model_name=messages.MODEL_NAME, id=request_id)
    for name, array in tensors.items():
        datatype = np_to_triton_dtype(array.dtype)
        message.inputs.add(name=name, datatype=datatype, shape=array.shape)
        is_text = datatype == "BYTES" and array.size  # an empty array serializes to one
        raw = serialize_byte_tensor(array).item() if is_text else array.tobytes()
        message.raw_input_contents.append(raw)
    message.parameters["sequence_id"].string_param = session_id
    message.parameters["sequence_start"].bool_param = start
    message.parameters["sequence_end"].bool_param = end
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def is_final(response: Any) -> bool:
    """Whether `response` (a ModelStreamInferResponse) is the last one of its request."""
    parameters = response.infer_response.parameters
    return "triton_final_response" in parameters and bool(parameters["triton_final_response"].bool_param)


def read_chunk(response: Any) -> StreamedChunk | None:
    """The chunk in `response`; None if it carries no tensors. The frames are a read-only view."""
    if not response.infer_response.outputs:
        return None
    result = InferResult(response.infer_response)
    tensors = {spec.name: result.as_numpy(spec.name) for spec in messages.OUTPUTS}
    missing = [name for name, array in tensors.items() if array is None]
    if missing:
        got = [output.name for output in response.infer_response.outputs]
        raise ValueError(f"got the tensors {got}, expected also {missing}")
    return StreamedChunk(**vars(FrameChunk.from_tensors(tensors)), arrived=time.monotonic())
