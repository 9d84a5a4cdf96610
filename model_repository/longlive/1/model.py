# SPDX-License-Identifier: Apache-2.0
"""The Triton model: converts between Triton's tensors and `longlive_serve`, which does everything else."""

from __future__ import annotations

import gc
import json
import logging
import os
from pathlib import Path

import triton_python_backend_utils as pb  # part of Triton's Python backend

from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.start_up import IMPORT, describe, measure_start, process_age
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.core import EngineCore
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.observability.log_setup import set_up
from longlive_serve.observability.triton_metrics import TritonMetrics
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import CLIENT_HEADER, FrameChunk, Request
from longlive_serve.triton_server.signals import on_sigterm

log = logging.getLogger("longlive_serve.model")


class TritonResponseSender:
    """Answers one request through its response sender."""

    def __init__(self, request: pb.InferenceRequest) -> None:
        self._sender = request.get_response_sender()

    def send(self, chunk: FrameChunk | None, final: bool) -> None:
        flags = pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL if final else 0
        tensors = [] if chunk is None else [pb.Tensor(name, array) for name, array in chunk.to_tensors().items()]
        self._sender.send(pb.InferenceResponse(tensors) if tensors else None, flags)

    def fail(self, error: RequestError) -> None:
        response = pb.InferenceResponse(error=pb.TritonError(str(error)))
        self._sender.send(response, pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def is_cancelled(self) -> bool:
        return self._sender.is_cancelled()


class TritonPythonModel:
    """Hands requests to an `EngineCore`, whose worker answers them later; `execute` does not wait."""

    def initialize(self, args: dict[str, str]) -> None:
        default = Path(args["model_repository"], args["model_version"], "serve.toml")
        config = ServeConfig.from_toml(os.environ.get("LONGLIVE_CONFIG", default))
        set_up(config.log_format)
        self.metrics = TritonMetrics(pb.MetricFamily)
        with measure_start() as seconds:
            seconds[IMPORT] = process_age()
            runner = ModelRunner(build_backends(config), config.model_config, config.variant)
            chunk_s = runner.warm_up()
        log.info("started in %.1f s: %s", process_age(), describe(seconds))
        self.metrics.publish([("start_seconds", (("phase", name),), value) for name, value in seconds.items()])
        self.engine = EngineCore(runner, config, self.metrics.publish, chunk_s)
        gc.collect()
        gc.freeze()  # a full collection of these objects would stop all sessions for 0.1 s
        on_sigterm(self.engine.drain)  # Triton calls finalize only after every client has left

    def execute(self, requests: list[pb.InferenceRequest]) -> None:
        for request in requests:
            self.engine.submit(_read(request), TritonResponseSender(request))

    def finalize(self) -> None:
        self.engine.stop()


def _read(request: pb.InferenceRequest) -> Request | RequestError:
    try:
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        start, end = (bool(request.flags() & bit) for bit in (1, 2))
        client = str(json.loads(request.parameters()).get(CLIENT_HEADER, ""))
        return Request.from_tensors(str(request.correlation_id() or ""), start, end, tensors, client)
    except RequestError as error:
        return error
    except Exception as error:  # the boundary of a request: others must continue
        return RequestError(RequestError.INTERNAL, f"the request cannot be read: {error!r}")
