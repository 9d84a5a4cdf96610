# SPDX-License-Identifier: Apache-2.0
"""A real Triton server, the real client and the real wire: what a session may count on."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlive_client.errors import FrameLimitError, InvalidRequestError, UnavailableError, VideoStreamError
from longlive_client.video_stream import StreamedChunk, VideoStream
from longlive_serve.protocol.errors import RequestError
from longlive_serve.triton_server.launcher import TritonServer
from tests.conftest import ExportedGraphs
from tests.fakes.service_bench import wait_until
from tests.support.live import RawStream, frames_of, metric, play, settled, start_server, text


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def server(
    request: pytest.FixtureRequest, exported: ExportedGraphs, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    """The same promises whatever runs the models."""
    backend = {} if request.param == "torch" else {"backend": request.param, "graphs": str(exported("tiny", "base"))}
    with start_server(tmp_path_factory.mktemp("live"), **backend) as running:
        yield running


def test_interleaved_sessions_give_the_frames_that_each_gives_alone(server: TritonServer) -> None:
    plays: list[dict[str, Any]] = [{"seed": 1}, {"seed": 2, "switch": ("a blue bird sleeps", 12)}]
    alone = [play(server, **how) for how in plays]
    together = play_in_turns(server, plays)
    for lone, mixed in zip(alone, together, strict=True):
        assert np.array_equal(frames_of(lone), frames_of(mixed))
        assert len(frames_of(lone)) == 9 + 12 * 7
        assert [chunk.first_frame for chunk in mixed] == [0, *range(9, 93, 12)]
    assert [chunk.prompt_index for chunk in together[1]] == [0] * 4 + [1] * 4


def play_in_turns(server: TritonServer, plays: list[dict[str, Any]]) -> list[list[StreamedChunk]]:
    """As `play`, but all at once: nobody gets the chunk after the next before everybody has the next."""
    with contextlib.ExitStack() as stack:
        streams = [
            stack.enter_context(
                VideoStream("a red fox runs", url=server.grpc_url, seed=how["seed"], chunks=1, pace="asap")
            )
            for how in plays
        ]
        for video, how in zip(streams, plays, strict=True):
            if "switch" in how:
                video.switch_prompt(how["switch"][0], at_latent_frame=how["switch"][1])
        made = [list(video.chunks()) for video in streams]
        for _ in range(7):
            for video in streams:
                video.request_chunks(1)
            for video, chunks in zip(streams, made, strict=True):
                chunks.extend(video.chunks())
    return made


def test_a_prompt_sent_between_chunks_takes_effect_at_the_next_border(server: TritonServer) -> None:
    with VideoStream("a red fox runs", url=server.grpc_url, seed=3, chunks=3, pace="asap") as video:
        chunks = list(video.chunks())
        assert video.switch_prompt("a blue bird sleeps") == 1
        video.request_chunks(6)
        chunks += video.chunks()
    assert [chunk.prompt_index for chunk in chunks] == [0] * 3 + [1] * 6


def test_a_prompt_sent_while_chunks_are_generated_takes_effect_at_a_border(server: TritonServer) -> None:
    """Which one, the server's speed says; but no more than `ahead` chunks are made before the viewer has seen one."""
    with VideoStream("a red fox runs", url=server.grpc_url, seed=3, pace="asap", ahead=4) as video:
        stream = video.chunks()
        before = [next(stream) for _ in range(3)]
        sent = time.monotonic()
        assert video.switch_prompt("a blue bird sleeps") == 1
        answered = time.monotonic()
        after = [next(stream) for _ in range(6)]
    chunks = before + after
    assert all(chunk.prompt_index == 0 for chunk in chunks if chunk.arrived < sent)
    assert all(chunk.prompt_index == 1 for chunk in chunks if chunk.arrived > answered)
    boundary = [chunk.prompt_index for chunk in chunks].index(1)
    assert 3 <= boundary <= 3 + 4
    unswitched = play(server, seed=3, chunks=len(chunks))
    assert np.array_equal(frames_of(chunks[:boundary]), frames_of(unswitched[:boundary]))
    assert not np.array_equal(chunks[boundary].frames, unswitched[boundary].frames)


KILLED_CLIENT = """
import sys
from longlive_client.video_stream import VideoStream
with VideoStream("a red fox runs", url=sys.argv[1], fps=1) as video:
    for number, chunk in enumerate(video.chunks()):
        print(number, flush=True)
"""


def test_a_killed_client_frees_its_slot(server: TritonServer) -> None:
    command = [sys.executable, "-c", KILLED_CLIENT, server.grpc_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3]) as client:
        assert client.stdout is not None
        for _ in range(2):  # the third comes in 12 s
            assert client.stdout.readline()
        assert metric(server, "live_sessions") == 1
        client.send_signal(signal.SIGKILL)
        client.wait()
        wait_until(lambda: metric(server, "live_sessions") == 0)


def test_fifty_sessions_through_two_slots_leave_nothing_behind(server: TritonServer) -> None:
    def viewer(number: int) -> int:
        if number % 5 == 0:  # leaves without a word, and long before it has got all that it has asked for
            with contextlib.suppress(VideoStreamError), VideoStream("a fox", url=server.grpc_url, fps=1) as video:
                for _ in video.chunks():
                    video.cancel()
            return 0
        return len(play(server, seed=number, chunks=2))

    def run(count: int) -> list[int]:
        with ThreadPoolExecutor(5) as pool:
            return list(pool.map(viewer, range(count)))

    run(10)  # Triton makes its threads and buffers when they are first needed
    before = settled(server)
    assert run(50) == [0 if number % 5 == 0 else 2 for number in range(50)]

    def nothing_is_left() -> bool:
        after = settled(server)
        return after["shared memory"] == before["shared memory"] and all(
            after[what] <= before[what] + 2 for what in ("threads", "files")
        )

    wait_until(nothing_is_left)  # connections close behind their streams, and threads when they have had nothing to do


MALFORMED: list[tuple[dict[str, Any], dict[str, bool], str]] = [
    ({}, {"start": True}, "START: got no PROMPT"),
    ({"PROMPT": text(" ")}, {"start": True}, "PROMPT: got an empty prompt"),
    ({"PROMPT": text(b"\xff\xfe fox")}, {"start": True}, "not UTF-8"),
    ({"PROMPT": text("fox"), "CHUNKS": np.array([-2], np.int32)}, {"start": True}, "CHUNKS: got -2"),
    ({"PROMPT": text("fox"), "CHUNKS": np.array([2], np.int64)}, {"start": True}, "CHUNKS"),
    ({"PROMPT": text("fox"), "CHUNKS": np.array([[2, 3]], np.int32)}, {"start": True}, "CHUNKS"),
    ({"PROMPT": np.array([1.5], np.float32)}, {"start": True}, "PROMPT"),
    ({"PROMPT": text("fox"), "SPEED": np.array([2], np.int32)}, {"start": True}, "SPEED"),
    ({"PROMPT": text("fox"), "OPTIONS": text('{"zoom": 2}')}, {"start": True}, "unknown key 'zoom'"),
    ({"PROMPT": text("fox"), "OPTIONS": text("not json")}, {"start": True}, "expected a JSON object"),
    ({"PROMPT": text("fox")}, {"start": True, "end": True}, "START with END"),
    ({"PROMPT": text("fox")}, {}, "START"),
]


def test_malformed_requests_are_refused_and_disturb_no_session(server: TritonServer) -> None:
    expected = frames_of(play(server, seed=4, chunks=1 + len(MALFORMED)))
    with VideoStream("a red fox runs", url=server.grpc_url, seed=4, chunks=1, pace="asap") as video:
        made = list(video.chunks())
        with pytest.raises(InvalidRequestError, match="got an empty prompt"):
            video.switch_prompt("")
        for tensors, flags, message in MALFORMED:
            video.request_chunks(1)  # it is generated beside the attack
            stream = RawStream(server)
            assert message in stream.ask(tensors, **flags)
            stream.close()
            made += video.chunks()
    assert np.array_equal(frames_of(made), expected)


def test_a_live_id_cannot_be_taken_and_a_finished_one_is_unknown(server: TritonServer) -> None:
    with VideoStream("a red fox runs", url=server.grpc_url, session_id="mine", chunks=4, pace="asap") as video:
        stream = video.chunks()
        next(stream)
        intruder = RawStream(server, "mine")
        assert RequestError.SESSION_EXISTS in intruder.ask({"PROMPT": text("a cat")}, start=True)
        intruder.close()
        assert len(list(stream)) == 3
    late = RawStream(server, "mine")
    assert RequestError.parse(late.ask({"PROMPT": text("more")})).kind == RequestError.UNKNOWN_SESSION
    late.close()


def test_more_chunks_can_be_asked_for(server: TritonServer) -> None:
    with VideoStream("a red fox runs", url=server.grpc_url, seed=5, chunks=2, pace="asap") as video:
        made = list(video.chunks())
        video.request_chunks(3)
        made += list(video.chunks())
    assert np.array_equal(frames_of(made), frames_of(play(server, seed=5, chunks=5)))


def test_a_truncated_prompt_is_announced(server: TritonServer) -> None:
    with VideoStream("fox " * 40, url=server.grpc_url, chunks=1) as video:
        assert [chunk.notice for chunk in video.chunks()] == [
            "prompt 0 was truncated: it has 160 tokens, the first 64 are used"
        ]


def test_the_third_session_waits_for_a_slot(server: TritonServer) -> None:
    with contextlib.ExitStack() as stack:
        live = [stack.enter_context(VideoStream("a fox", url=server.grpc_url, seed=n)) for n in range(2)]
        for video in live:
            next(video.chunks())
        third = stack.enter_context(VideoStream("a bird", url=server.grpc_url, chunks=1))
        wait_until(lambda: metric(server, "waiting_sessions") == 1)
        live[0].close()
        notices = [chunk.notice for chunk in third.chunks()]
        assert notices == ["waiting for a slot: place 1 of 1", "a slot is free: generating", ""]


def test_who_asks_in_vain_for_a_slot_waits_at_the_last_try(tmp_path: Path) -> None:
    with start_server(tmp_path, slots=1) as server, VideoStream("a fox", url=server.grpc_url) as live:
        next(live.chunks())
        with VideoStream("a bird", url=server.grpc_url, chunks=2, max_attempts=3) as video:
            chunks = video.chunks()
            assert next(chunks).notice == "waiting for a slot: place 1 of 1"
            assert (metric(server, "redirected_sessions"), metric(server, "refused_sessions")) == (2, 0)
            live.close()
            told = [(chunk.notice, len(chunk.frames)) for chunk in chunks]
            assert told == [("a slot is free: generating", 0), ("", 9), ("", 12)]


def test_an_idle_session_is_reaped(tmp_path: Path) -> None:
    with (
        start_server(tmp_path, idle_timeout_s=0.5) as server,
        VideoStream("a fox", url=server.grpc_url, chunks=1) as video,
    ):
        assert len(list(video.chunks())) == 1
        wait_until(lambda: metric(server, "live_sessions") == 0)
        with pytest.raises(VideoStreamError) as raised:
            video.switch_prompt("anyone?")
        assert raised.value.kind == RequestError.UNKNOWN_SESSION


@pytest.mark.parametrize("variant", ["base", "infinity"])
def test_1100_latent_frames(tmp_path: Path, variant: str) -> None:
    chunks = 367
    made = 0
    with start_server(tmp_path, variant=variant, decoder="tiny", max_requests_per_s=1000) as server:
        video = VideoStream("a fox", url=server.grpc_url, chunks=chunks, pace="asap")
        with contextlib.ExitStack() as stack:
            if variant == "base":
                stack.enter_context(pytest.raises(FrameLimitError, match="ends after 1023 latent frames"))
            stack.enter_context(video)
            video.switch_prompt("a bird", at_latent_frame=960)
            for chunk in video.chunks():
                assert chunk.first_frame == made
                assert chunk.prompt_index == (made >= 3837)  # the first frame of latent frame 960
                made += len(chunk.frames)
    assert chunk.frames.std() > 1, "there is a picture"
    assert made == (4089 if variant == "base" else 9 + 12 * (chunks - 1))


def test_a_live_session_is_paced_and_one_beyond_the_queue_is_refused(tmp_path: Path) -> None:
    with start_server(tmp_path, slots=1, max_waiting=0, trace_dir=str(tmp_path / "traces")) as server:
        assert metric(server, "capacity_sessions") == 1
        with VideoStream("a fox", url=server.grpc_url, chunks=8, fps=48) as video:
            chunks = [next(video.chunks())]
            refusal = "0 sessions are waiting for a slot already; try again in 30 s"
            with (
                pytest.raises(UnavailableError, match=refusal),
                VideoStream("a bird", url=server.grpc_url, chunks=1) as refused,
            ):
                list(refused.chunks())
            chunks += list(video.chunks())
        assert len(frames_of(chunks)) == 9 + 12 * 7
        wait_until(lambda: metric(server, "live_sessions") == 0)
        assert metric(server, "refused_sessions") == 1, "however many servers it would have asked"
    (trace,) = (tmp_path / "traces").glob(f"{video.session_id}.json")
    events = [
        event for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"] if event["tid"] == "chunks"
    ]
    assert len(events) == 8
    for number, event in enumerate(events):
        ahead = "one chunk ahead of a clock that plays four in a second"
        assert event["ts"] >= events[0]["ts"] + (number - 2) * 1e6 / 4, ahead
