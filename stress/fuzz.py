# SPDX-License-Identifier: Apache-2.0
"""Sends thousands of invalid requests to a server with live sessions: `python -m stress.fuzz --requests 10000`.

Every request must get a response, every refusal must name its cause, and the frames of the live sessions must be
bitwise identical to those of an undisturbed run. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.progress import Progress
from tritonclient.grpc import service_pb2_grpc

from benchmarks.command_line import exit_code, write_serving_results
from benchmarks.results import Measurement
from benchmarks.serving.__main__ import server_metrics
from longlive_client import wire
from longlive_client.cli.health import probe
from longlive_client.errors import UnavailableError
from longlive_client.grpc_transport import channel
from longlive_client.video_stream import VideoStream
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import INPUTS, MAX_PROMPT_BYTES
from longlive_serve.triton_server.launcher import TritonServer

NUM_LIVE_SESSIONS = 2  # that must not be disturbed
MAX_STREAMS = 8  # at a time
REQUESTS_PER_STREAM = 50  # requests on one gRPC stream
TIMEOUT_S = 120.0
SETTINGS = 'preset = "tiny"\nslots = 4\nmax_waiting = 8\nmax_wait_s = 5\nidle_timeout_s = 2\nmax_unacked = 16\n'
# A refusal must name a tensor, a flag, the session, the queue, or an input as Triton does.
NAMED_CAUSE = re.compile(
    "|".join(
        (*(spec.name for spec in INPUTS), "START", "session", "waiting for a slot", "free in", "input", "request", "ID")
    )
)

INVALID_TEXTS = (
    b"",
    b" \t\n",
    b"\xff\xfe\x00",
    b"x" * (MAX_PROMPT_BYTES + 1),
    "\U0001f98a\u202e\x00".encode(),
    b"[" * 9000,
)
INVALID_OPTIONS = (
    "[]", "null", '{"pace": 3}', '{"pace": "warp"}', '{"fps": 0}', '{"fps": 1e999}', '{"zoom": 1}',
    '{"session_token": "x"}', '{"at_latent_frame": -4}', '{"at_latent_frame": 9}', '{"snapshot_every": -1}',
    '{"on_switch": true}', "[" * 9000, '{"global_sink": null}', '{"fps": 99999999999999999999999999}',
    '{"pace": NaN}', '{"max_wait_s": 1e999}', '{"adapters": {"x": 1}}', '{"adapters": []}', '{"adapters": {"x": "y"}}',
    '{"command": "stop"}', '{"command": "health", "fps": 3}',
)  # fmt: skip
INVALID_INTEGERS = (-1, -(2**31), 2**31 - 1, 7)
DTYPES = (np.int8, np.int32, np.int64, np.uint8, np.float32, np.float64, np.bool_, np.object_)


@dataclasses.dataclass
class FuzzRequest:
    """A request and its responses."""

    session_id: str
    tensors: dict[str, np.ndarray[Any, Any]]
    flags: dict[str, bool]
    corrupt: Callable[[Any], None] = lambda message: None
    """Changes the protobuf message."""
    num_responses: int = 0
    error: str = ""


class Mutator:
    """Creates requests with one to three errors, deterministic by seed."""

    def __init__(self, seed: int, snapshot: bytes, live_ids: Sequence[str]) -> None:
        self.random = random.Random(seed)
        self.snapshot, self.live_ids = snapshot, live_ids

    def make_request(self) -> FuzzRequest:
        rng = self.random
        request = rng.choice((self._start, self._start, self._resume, self._update, self._end))()
        for _ in range(rng.randint(1, 3)):
            mutations = (
                self._mutate_value,
                self._mutate_dtype,
                self._mutate_shape,
                self._add_tensor,
                self._mutate_flags,
                self._mutate_session_id,
                self._mutate_message,
            )
            rng.choice(mutations)(request)
        if request.session_id in self.live_ids:  # Triton ends a sequence on any END, from any client
            request.flags.pop("end", None)
        return request

    def _start(self) -> FuzzRequest:
        options = {"pace": "asap", "session_token": "t" * 16}
        tensors = {
            "PROMPT": _string_tensor("a fox"),
            "CHUNKS": np.array([1], np.int32),
            "OPTIONS": _string_tensor(json.dumps(options)),
        }
        return FuzzRequest(wire.new_session_id(), tensors, {"start": True, "end": self.random.random() < 0.8})

    def _resume(self) -> FuzzRequest:
        data = bytearray(self.snapshot)
        for _ in range(self.random.randint(0, 3)):
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
        tensors: dict[str, Any] = {"SNAPSHOT": np.frombuffer(bytes(data), np.uint8), "CHUNKS": np.array([1], np.int32)}
        return FuzzRequest(wire.new_session_id(), tensors, {"start": True, "end": True})

    def _update(self) -> FuzzRequest:
        return FuzzRequest(self.random.choice(self.live_ids), {"PROMPT": _string_tensor("a bird")}, {})

    def _end(self) -> FuzzRequest:
        return FuzzRequest(wire.new_session_id(), {}, {"end": True})

    def _mutate_value(self, request: FuzzRequest) -> None:
        name = self.random.choice([spec.name for spec in INPUTS])
        if name == "PROMPT":
            request.tensors[name] = np.array([self.random.choice(INVALID_TEXTS)], np.object_)
        elif name == "OPTIONS":
            request.tensors[name] = _string_tensor(self.random.choice(INVALID_OPTIONS))
        elif name == "SNAPSHOT":
            request.tensors[name] = np.frombuffer(self.random.randbytes(self.random.randrange(300)), np.uint8)
        else:
            dtype = np.int32 if name == "CHUNKS" else np.int64
            request.tensors[name] = np.array([self.random.choice(INVALID_INTEGERS)], dtype)

    def _mutate_dtype(self, request: FuzzRequest) -> None:
        name, dtype = self._random_name(request), self.random.choice(DTYPES)
        value = b"3" if dtype is np.object_ else 3
        request.tensors[name] = np.array([value], dtype)

    def _mutate_shape(self, request: FuzzRequest) -> None:
        name = self._random_name(request)
        array = request.tensors.get(name, np.array([1], np.int32))
        request.tensors[name] = self.random.choice(
            (array[:0], array[None], np.concatenate([array, array]), array.reshape(-1, 1, 1))
        )

    def _add_tensor(self, request: FuzzRequest) -> None:
        request.tensors[self.random.choice(("", "prompt", "FRAMES", "X" * 300, "\u00e9"))] = np.array([1], np.int32)

    def _mutate_flags(self, request: FuzzRequest) -> None:
        request.flags = {"start": self.random.random() < 0.5, "end": self.random.random() < 0.5}

    def _mutate_session_id(self, request: FuzzRequest) -> None:
        request.session_id = self.random.choice((*self.live_ids, "", "x" * 5000, "\u00e9\u202e", "0"))

    def _mutate_message(self, request: FuzzRequest) -> None:
        request.corrupt = self.random.choice((_truncate, _append_raw_contents, _enlarge_shape, _negate_shape))

    def _random_name(self, request: FuzzRequest) -> str:
        return self.random.choice([*request.tensors, "CHUNKS", "SEED"])


def _string_tensor(value: str) -> np.ndarray[Any, Any]:
    return np.array([value.encode()], np.object_)


def _truncate(message: Any) -> None:
    if message.raw_input_contents:
        message.raw_input_contents[-1] = message.raw_input_contents[-1][:-1]


def _append_raw_contents(message: Any) -> None:
    message.raw_input_contents.append(b"\xff" * 9)


def _enlarge_shape(message: Any) -> None:
    if message.inputs:
        message.inputs[0].shape[:] = [2**40]


def _negate_shape(message: Any) -> None:
    if message.inputs:
        message.inputs[-1].shape[:] = [-5, 3]


def send(url: str, requests: Sequence[FuzzRequest]) -> None:
    """Send all requests over one stream, then wait for all responses."""
    messages = []
    for number, request in enumerate(requests):
        message = wire.infer_request(request.session_id, str(number), request.tensors, **request.flags)
        request.corrupt(message)
        messages.append(message)
    with channel(url, None) as connection:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(connection)
        for response in stub.ModelStreamInfer(iter(messages), timeout=TIMEOUT_S):
            request = requests[int(response.infer_response.id)]
            request.num_responses += 1
            request.error = request.error or str(response.error_message)


def check_responses(requests: Sequence[FuzzRequest]) -> Iterator[str]:
    """Yield the violations: missing responses and refusals without a cause."""
    for request in requests:
        description = f"{request.flags} { ({name: (str(a.dtype), a.shape) for name, a in request.tensors.items()}) }"
        if not request.num_responses:
            yield f"no response: {description}"
        elif request.error and (not NAMED_CAUSE.search(request.error) or _is_internal_error(request.error)):
            yield f"refusal without a cause: {request.error!r}: {description}"


def _is_internal_error(text: str) -> bool:
    return f"[{RequestError.INTERNAL}]" in text


def video(url: str, seed: int, chunks: int, ids: list[str]) -> np.ndarray[Any, Any]:
    """Stream a whole video. While the invalid requests fill the queue, retry for up to a minute."""
    last_try = time.monotonic() + 60
    while True:
        try:
            with VideoStream(  # one attempt, to keep the id that the requests attack
                "a red fox runs", url=url, seed=seed, chunks=chunks, pace="asap", max_attempts=1, resume_for=0
            ) as stream:
                ids.append(stream.session_id)
                return np.concatenate([chunk.frames for chunk in stream.chunks()])
        except UnavailableError:
            if time.monotonic() > last_try:
                raise
            time.sleep(0.1)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".toml") as config:
        print(SETTINGS, file=config, flush=True)
        with TritonServer(config=Path(config.name)) as server:
            return run_against(server, args)


def run_against(server: TritonServer, args: argparse.Namespace) -> dict[str, Any]:
    url = server.grpc_url
    with VideoStream("a fox", url=url, chunks=5, pace="asap", session_token="t" * 16) as stream:
        snapshot = list(stream.chunks())[-1].snapshot
    expected = [video(url, seed, args.chunks, []) for seed in range(NUM_LIVE_SESSIONS)]
    counts: collections.Counter[str] = collections.Counter()
    num_changed_videos, ids, done = 0, list[str](), threading.Event()

    def live(seed: int) -> int:
        runs = errors = 0
        while not done.is_set() or not runs:
            runs += 1
            errors += not np.array_equal(video(url, seed, args.chunks, ids), expected[seed])
        return errors

    def send_requests(first: int) -> list[FuzzRequest]:
        mutator = Mutator(args.seed * args.requests + first, snapshot, list(ids[-NUM_LIVE_SESSIONS:]))
        requests = [mutator.make_request() for _ in range(min(REQUESTS_PER_STREAM, args.requests - first))]
        send(url, requests)
        return requests

    with (
        ThreadPoolExecutor(NUM_LIVE_SESSIONS) as live_pool,
        ThreadPoolExecutor(MAX_STREAMS) as stream_pool,
        Progress() as progress,
    ):
        tasks = [live_pool.submit(live, seed) for seed in range(NUM_LIVE_SESSIONS)]
        while len(ids) < NUM_LIVE_SESSIONS:
            time.sleep(0.01)
        try:
            starts = range(0, args.requests, REQUESTS_PER_STREAM)
            for requests in progress.track(
                stream_pool.map(send_requests, starts), total=len(starts), description="streams"
            ):
                counts.update(check_responses(requests))
                counts["refused"] += sum(bool(request.error) for request in requests)
        finally:
            done.set()
        num_changed_videos = sum(task.result() for task in tasks)
    refused = counts.pop("refused")
    probe(url, 10.0)  # raises if the model is gone
    return {
        "requests": args.requests,
        "refused": refused,
        "crashes": int(server_metrics(server.metrics_url)["failed_sessions"]),
        "disturbed_videos": num_changed_videos,
        "unexplained": dict(counts.most_common(20)),
    }


@exit_code(grpc.RpcError, RequestError)
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m stress.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--chunks", type=int, default=20, help="length of the live sessions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of the requests (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args(argv)
    measurement = Measurement.begin("stress.fuzz", argv)
    results = run(args)
    print(json.dumps(results, indent=2))
    top_level = {"fuzz_requests": args.requests, "fuzz_crashes": results["crashes"]}
    write_serving_results(
        measurement, args.json, results, section="trials.fuzz", code="stress/fuzz.py", top_level=top_level
    )
    return 1 if results["crashes"] or results["disturbed_videos"] or results["unexplained"] else 0


if __name__ == "__main__":
    sys.exit(main())
