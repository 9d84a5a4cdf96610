# SPDX-License-Identifier: Apache-2.0
"""A real Triton server under faults and intruders: what a session survives and who is kept out."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

from longlive_client.cli.health import main, probe
from longlive_client.errors import ConnectionLostError, ForbiddenError, InvalidRequestError, ServerShutdownError
from longlive_client.grpc_transport import ENV_NAMES
from longlive_client.video_stream import Tls, VideoStream
from longlive_serve.protocol.errors import RequestError
from longlive_serve.protocol.messages import MAX_SNAPSHOT_BYTES
from longlive_serve.triton_server.launcher import TritonServer
from tests.fakes.service_bench import LIMIT_S, wait_until
from tests.support.live import RawStream, frames_of, metric, play, start_server, stub_of, text


def test_a_server_that_shuts_down_says_so(tmp_path: Path) -> None:
    with (
        start_server(tmp_path) as server,
        VideoStream("a fox", url=server.grpc_url, resume_for=0) as video,
    ):
        stream = video.chunks()
        next(stream)
        os.killpg(server.pid, signal.SIGTERM)  # as the launcher does
        with pytest.raises(ServerShutdownError):
            list(stream)


def test_the_probe_sees_a_dead_model_that_triton_calls_ready(tmp_path: Path) -> None:
    with start_server(tmp_path, slots=1) as server:
        ask = ["--url", server.grpc_url, "--timeout", str(LIMIT_S)]
        assert main([*ask, "--ready"]) == 0
        with VideoStream("a fox", url=server.grpc_url) as video:
            next(video.chunks())
            assert probe(server.grpc_url, LIMIT_S) == "full: 1 sessions are live, 0 wait"
            assert main(ask) == 0
            assert main([*ask, "--ready"]) == 1
        wait_until(lambda: metric(server, "live_sessions") == 0)  # in the middle of an answer Triton may die with it
        os.kill(stub_of(server), signal.SIGKILL)
        assert main(["--url", server.grpc_url, "--timeout", "3"]) == 1
        with urllib.request.urlopen(f"http://{server.http_url}/v2/health/ready", timeout=LIMIT_S) as response:
            assert response.status == 200, "Triton itself notices nothing"


@pytest.mark.numeric
def test_a_session_goes_on_from_a_snapshot_on_another_server(server: TritonServer, tmp_path: Path) -> None:
    with VideoStream("a fox", url=server.grpc_url, seed=6, chunks=1, snapshot_every=2, pace="asap") as video:
        video.switch_prompt("a bird", at_latent_frame=9)
        video.request_chunks(11)
        chunks = list(video.chunks())
    assert [bool(chunk.snapshot) for chunk in chunks] == [False, True] * 6
    snapshot, token = chunks[7].snapshot, video.session_token
    with (
        start_server(tmp_path) as other,
        VideoStream(None, url=other.grpc_url, snapshot=snapshot, session_token=token, chunks=4, pace="asap") as video,
    ):
        resumed = list(video.chunks())
        assert metric(other, "resumed_sessions") == 1
    assert [chunk.first_frame for chunk in resumed] == [chunk.first_frame for chunk in chunks[8:]]
    assert {chunk.prompt_index for chunk in resumed} == {1}
    seam = np.abs(frames_of(resumed)[:4].astype(int) - frames_of(chunks[8:])[:4].astype(int)).mean()
    assert seam < 0.2 * np.abs(np.diff(frames_of(chunks).astype(int), axis=0)).mean()


def test_a_damaged_snapshot_is_refused(server: TritonServer) -> None:
    with VideoStream("a fox", url=server.grpc_url, chunks=1, snapshot_every=1, pace="asap") as video:
        (chunk,) = video.chunks()
    with (
        pytest.raises(InvalidRequestError, match="SNAPSHOT: its checksum is wrong"),
        VideoStream(None, url=server.grpc_url, snapshot=chunk.snapshot[:-1]) as video,
    ):
        list(video.chunks())


def test_a_snapshot_needs_its_sessions_token(server: TritonServer) -> None:
    with VideoStream("a fox", url=server.grpc_url, chunks=1, pace="asap") as video:
        (chunk,) = video.chunks()
    with (
        pytest.raises(ForbiddenError, match="expected the token of the SNAPSHOT's session"),
        VideoStream(None, url=server.grpc_url, snapshot=chunk.snapshot) as thief,
    ):
        list(thief.chunks())


def test_a_session_outlives_its_server(tmp_path: Path) -> None:
    """SIGTERM, SIGKILL of the model's process and SIGKILL of Triton; a new server takes the place of each."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start_server(tmp_path))
        port = int(server.grpc_url.rsplit(":", 1)[1])
        # A busy machine needs its time to start a server.
        video = VideoStream("a fox", url=server.grpc_url, chunks=40, fps=96, seed=5, stall_timeout=8, resume_for=600)
        stack.enter_context(video)
        chunks, frame, prompts = video.chunks(), 0, []
        for fault in ("drain", "stub", "server", None):
            for chunk in itertools.islice((chunk for chunk in chunks if len(chunk.frames)), 10):
                assert chunk.first_frame == frame
                frame += len(chunk.frames)
                prompts.append(chunk.prompt_index)
            if fault == "drain":
                video.switch_prompt("a bird")
                os.killpg(server.pid, signal.SIGTERM)
            elif fault == "stub":
                os.kill(stub_of(server), signal.SIGKILL)
            elif fault == "server":
                os.kill(server.pid, signal.SIGKILL)
            if fault:
                (server.stop if fault == "drain" else server.kill)()
                server = stack.enter_context(start_server(tmp_path, grpc_port=port))
        assert not list(chunks)
        assert frame == 9 + 12 * 39
        assert (prompts[8], prompts[-1]) == (0, 1), "the switch got lost on the way"
        assert video.resumed >= 3
        assert metric(server, "resumed_sessions") >= 1


def test_strangers_cannot_steer_or_end_a_session(server: TritonServer) -> None:
    alone = play(server, seed=9, chunks=6)
    with VideoStream("a red fox runs", url=server.grpc_url, seed=9, chunks=6, pace="asap") as video:
        stream = video.chunks()
        made = [next(stream)]
        stranger = RawStream(server, video.session_id)
        for tensors in ({}, {"PROMPT": text("a cat")}, {"PROMPT": text("a cat"), "OPTIONS": token("0")}):
            assert RequestError.parse(stranger.ask(tensors)).kind == RequestError.FORBIDDEN
        stranger.close()
        made += list(stream)
    assert np.array_equal(frames_of(made), frames_of(alone))


def token(digit: str) -> np.ndarray[Any, Any]:
    return text(json.dumps({"session_token": digit * 32}))


def test_a_server_may_insist_on_tokens_and_on_few_requests(tmp_path: Path) -> None:
    with start_server(tmp_path, require_session_token=True, max_requests_per_s=3, max_sessions_per_client=1) as server:
        stranger = RawStream(server)
        assert "OPTIONS.session_token: got none" in stranger.ask({"PROMPT": text("a cat")}, start=True)
        stranger.close()
        with VideoStream("a fox", url=server.grpc_url, chunks=1, pace="asap") as video:
            assert len(list(video.chunks())) == 1
            hasty = RawStream(server, video.session_id)
            answers = list(hasty.answers(50, {"OPTIONS": text(json.dumps({"session_token": video.session_token}))}))
            hasty.close()
            assert answers.count("") >= 3
            refused = {answer for answer in answers if answer}
            assert {RequestError.parse(answer).kind for answer in refused} == {RequestError.RATE_LIMITED}
            assert all("got more than 3 requests in a second; wait 1 s" in answer for answer in refused)
            time.sleep(1.1)
            video.request_chunks(1)
            assert len(list(video.chunks())) == 1
        start = {"PROMPT": text("a cat"), "OPTIONS": token("1"), "CHUNKS": np.array([1], np.int32)}
        first, second, other = (RawStream(server, client=name) for name in ("ann", "ann", "bob"))
        assert first.ask(start, start=True) == ""
        assert "client 'ann' has 1 sessions, expected at most 1" in second.ask(start, start=True)
        assert other.ask(start, start=True) == ""


def test_messages_that_are_too_long_are_refused(server: TritonServer) -> None:
    stream = RawStream(server)
    assert "PROMPT: got 65537 bytes, expected at most 65536" in stream.ask({"PROMPT": text("x" * 65537)}, start=True)
    snapshot = np.zeros(MAX_SNAPSHOT_BYTES + 1, np.uint8)
    assert "SNAPSHOT: got uint8 [67108865]" in stream.ask({"SNAPSHOT": snapshot}, start=True)
    stream.close()


def test_a_client_that_reads_nothing_is_paused_and_then_dropped(tmp_path: Path) -> None:
    with start_server(tmp_path, max_unacked=16, idle_timeout_s=1.0) as server:
        stream = RawStream(server)
        answer = stream.ask({"PROMPT": text("a fox"), "OPTIONS": text('{"pace": "asap"}')}, start=True)
        assert "the client does not read: 16 chunks were sent since its last request" in answer
        assert metric(server, "chunks") == 16
        stream.close()


def test_a_viewer_who_pauses_for_long_goes_on_where_it_was(tmp_path: Path) -> None:
    with (
        start_server(tmp_path, max_unacked=16, idle_timeout_s=2.0) as server,
        VideoStream("a fox", url=server.grpc_url, chunks=40, pace="asap") as video,
    ):
        chunks = video.chunks()
        seen = [next(chunks)]
        wait_until(lambda: metric(server, "live_sessions") == 0)  # it takes nobody's slot meanwhile
        seen += [chunk for chunk in chunks if len(chunk.frames)]
        assert [chunk.first_frame for chunk in seen] == [0, *range(9, 9 + 12 * 39, 12)]
        assert video.resumed >= 1


def test_tls_and_mutual_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name, signer in (("server", authority), ("client", authority), ("stranger", stranger)):
        issued = signer.issue_cert("localhost", "127.0.0.1")
        issued.private_key_pem.write_to_path(str(tmp_path / f"{name}.key"))
        issued.cert_chain_pems[0].write_to_path(str(tmp_path / f"{name}.pem"))

    def tls(name: str | None) -> Tls:
        cert, key = (None, None) if name is None else (tmp_path / f"{name}.pem", tmp_path / f"{name}.key")
        return Tls(ca=tmp_path / "ca.pem", cert=cert, key=key)

    def watch(server: TritonServer, tls: Tls | None) -> int:
        with VideoStream("a fox", url=server.grpc_url, chunks=2, pace="asap", tls=tls) as video:
            return len(list(video.chunks()))

    files = {"tls_cert": tmp_path / "server.pem", "tls_key": tmp_path / "server.key"}
    with start_server(tmp_path, **files) as server:
        assert watch(server, tls(None)) == 2
        ask = ["--url", server.grpc_url, "--timeout", str(LIMIT_S)]
        assert main([*ask, "--tls-ca", str(tmp_path / "ca.pem")]) == 0
        with pytest.raises(ConnectionLostError, match="cannot be reached"):
            watch(server, None)
        with pytest.raises(ConnectionLostError, match="cannot be reached"):
            watch(server, Tls())  # signed by an authority that this machine does not know
        with urllib.request.urlopen(f"http://{server.http_url}/v2/models/longlive/ready", timeout=LIMIT_S) as answer:
            assert answer.status == 200, "a load balancer may ask for it in the clear"
        for path in ("", "/models/longlive/config", "/systemsharedmemory/status"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"http://{server.http_url}/v2{path}", timeout=LIMIT_S)
    with start_server(tmp_path, **files, tls_client_ca=tmp_path / "ca.pem") as server:
        assert watch(server, tls("client")) == 2
        for name, file in (("tls-ca", "ca.pem"), ("tls-cert", "client.pem"), ("tls-key", "client.key")):
            monkeypatch.setenv(ENV_NAMES[name], str(tmp_path / file))  # as pods have it
        assert main(["--url", server.grpc_url, "--timeout", str(LIMIT_S)]) == 0
        for wrong in (None, "stranger"):
            with pytest.raises(ConnectionLostError, match="cannot be reached"):
                watch(server, tls(wrong))
