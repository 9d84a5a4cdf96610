# SPDX-License-Identifier: Apache-2.0
"""A real server with an echo model, which starts in a second; and the server's command line as a process."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc as triton

from longlive_serve.protocol.messages import MODEL_NAME
from longlive_serve.triton_server.arguments import DEFAULT_REPOSITORY
from tests.fakes.service_bench import LIMIT_S

ECHO_MODEL = '''
import os
import sys

import numpy as np
import triton_python_backend_utils as pb

import longlive_serve
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.protocol.messages import FrameChunk


class TritonPythonModel:
    """Responds with its settings and logs 100 kB; a request with CHUNKS = 0 stays open."""

    def initialize(self, args):
        self.config = ServeConfig.from_toml(os.environ["LONGLIVE_CONFIG"])
        if self.config.weights.endswith("missing"):
            raise RuntimeError("there are no weights")
        self.open = []

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            print(("x" * 99 + "\\n") * 1000, file=sys.stderr, flush=True)
            notice = f"{self.config.slots} {longlive_serve.__file__}"
            chunk = FrameChunk(frames=np.zeros((0, 0, 0, 3), np.uint8), first_frame=0, prompt_index=0, notice=notice)
            tensors = [pb.Tensor(name, array) for name, array in chunk.to_tensors().items()]
            chunks = pb.get_input_tensor_by_name(request, "CHUNKS")
            if chunks is not None and chunks.as_numpy()[0] == 0:
                sender.send(pb.InferenceResponse(tensors))
                self.open.append(sender)
            else:
                sender.send(pb.InferenceResponse(tensors), pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
'''


def write_repository(folder: Path) -> Path:
    """A model repository in `folder` with the shipped config.pbtxt and the echo."""
    version = folder / MODEL_NAME / "1"
    version.mkdir(parents=True)
    shutil.copy(DEFAULT_REPOSITORY / MODEL_NAME / "config.pbtxt", version.parent)
    (version / "model.py").write_text(ECHO_MODEL, encoding="utf-8")
    (version / "serve.toml").write_text('preset = "tiny"\nslots = 7\n', encoding="utf-8")
    return folder


class EchoStream:
    """A stream of tritonclient; `answers` receives (result, error)."""

    def __init__(self, url: str) -> None:
        self.answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client = triton.InferenceServerClient(url)
        self._client.start_stream(lambda result, error: self.answers.put((result, error)))

    def __enter__(self) -> EchoStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def send(self, chunks: int | None, *, end: bool) -> None:
        inputs = []
        if chunks is not None:
            inputs.append(triton.InferInput("CHUNKS", [1], "INT32"))
            inputs[0].set_data_from_numpy(np.array([chunks], np.int32))
        self._client.async_stream_infer(MODEL_NAME, inputs, sequence_id="echo", sequence_start=True, sequence_end=end)

    def notice(self) -> str:
        result, error = self.answers.get(timeout=LIMIT_S)
        assert error is None, error
        return str(result.as_numpy("NOTICE")[0].decode())


def parents() -> dict[int, int]:
    """The parent of each living process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, parent = (folder / "stat").read_text(encoding="utf-8").rpartition(") ")[2].split()[:2]
            if state != "Z":
                found[int(folder.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    found, tree = {pid}, parents()
    while more := {child for child, parent in tree.items() if parent in found} - found:
        found |= more
    return found - {pid}


class Launched:
    """The command line as a process, once ready; its temporary files are in `folder`."""

    def __init__(self, repository: Path, folder: Path, *options: str, stderr: int | None = None) -> None:
        """`stderr`: a file descriptor; None: `said` returns the output."""
        folder.mkdir()
        self._folder, self._said = folder, folder.with_name("stderr")
        ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
        with self._said.open("w", encoding="utf-8") as said:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "longlive_serve.triton_server",
                    f"--model-repository={repository}",
                    *ports,
                    *options,
                ],
                env=dict(os.environ, TMPDIR=str(folder)),
                stdout=subprocess.PIPE,
                stderr=said if stderr is None else stderr,
                text=True,
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()
        self.grpc_url = self.ready_line.partition("gRPC ")[2].partition(",")[0]
        self.descendants = descendants(self.process.pid)

    @property
    def said(self) -> str:
        """The output on stderr so far."""
        return self._said.read_text(encoding="utf-8")

    def echo(self) -> str:
        """Send a request and return its response."""
        with EchoStream(self.grpc_url) as stream:
            stream.send(chunks=None, end=True)
            return stream.notice()

    def leftovers(self) -> list[str]:
        processes = [f"process {pid}" for pid in self.descendants & parents().keys()]
        shared_memory = Path("/dev/shm").glob(f"longlive_{self.process.pid}_*")
        return processes + [str(path) for path in (*shared_memory, *self._folder.iterdir())]
