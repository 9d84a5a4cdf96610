# SPDX-License-Identifier: Apache-2.0
"""The command line against a scripted server: which files it leaves, what it says, how it exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from longlive_client.cli.generate import main
from longlive_client.cli.timing import Timing
from longlive_client.wire import StreamedChunk
from tests.fakes.scripted_triton import (
    Conversation,
    Received,
    ScriptedTriton,
    acknowledgement,
    chunk,
    error,
    recorded,
    well_behaved,
)
from tests.fakes.service_bench import LIMIT_S


def frame_count(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_a_prompt_becomes_a_long_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedTriton(well_behaved) as server:
        code = main(["--prompt", "A [red] fox!", "--seconds", "2", "--url", server.url, "--out", str(tmp_path)])
    assert code == 0
    assert frame_count(tmp_path / "long" / "a-red-fox-0.mp4") == 33
    assert " 33 " in capsys.readouterr().out


def test_a_file_of_scenes_becomes_interactive_videos(tmp_path: Path) -> None:
    requests: list[Received] = []
    scenes = tmp_path / "film.jsonl"
    scenes.write_text(
        json.dumps({"prompts": ["a fox", "a bear", "a hare"], "seconds": 5})
        + "\n"
        + json.dumps({"prompts": [{"prompt": "x"}, {"prompt": "y", "at": 1}], "name": "two", "seconds": 2, "seed": 9})
    )
    sheet = tmp_path / "sheet.png"
    options = ["--switch-at", "1.5,3", "--out", str(tmp_path), "--contact-sheet", str(sheet), "--seed", "4"]
    with ScriptedTriton(recorded(well_behaved, requests)) as server:
        assert main(["--prompts", str(scenes), "--url", server.url, *options]) == 0
    assert frame_count(tmp_path / "interactive" / "film-1.mp4") == 81
    assert frame_count(tmp_path / "interactive" / "two.mp4") == 33
    assert sheet.exists()
    first = requests[: len(requests) - 4]
    assert [(r.prompt, r.chunks, r.options.at_latent_frame, r.end) for r in first] == [
        ("a fox", 1, None, False),
        ("a bear", None, 6, False),
        ("a hare", None, 12, False),
        (None, 6, None, False),
        (None, None, None, True),
    ]
    assert [r.tensors["SEED"].item() for r in requests if r.start] == [4, 9]


def test_failures_are_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--prompt", "a fox", "--url", "127.0.0.1:1"], "127.0.0.1:1: cannot be reached"),
        (["--prompt", " "], "got an empty one"),
        (["--prompt", "a fox", "--name", "../x"], "a file name"),
        (["--prompt", "a fox", "--seconds", "nan"], "seconds: got nan"),
        (["--prompt", "a fox", "--crf", "99"], "crf: got 99"),
        (["--prompts", str(tmp_path / "none.jsonl")], "cannot be read"),
    ):
        assert main([*arguments, "--out", str(tmp_path)]) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(said) == 1
        assert message in said[0]
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_video_that_the_server_cuts_short_is_kept_as_partial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def script(conversation: Conversation) -> Iterator[Any]:
        start = conversation.next()
        yield chunk(start, 0)
        yield chunk(start, 1)
        yield error(start, "[frame_limit] the video has 1023 latent frames")

    with ScriptedTriton(script) as server:
        assert main(["--prompt", "a fox", "--name", "x", "--url", server.url, "--out", str(tmp_path)]) == 1
    assert frame_count(tmp_path / "long" / "x.partial.mp4") == 21
    said = capsys.readouterr().err
    assert "error: the video has 1023 latent frames" in said
    assert "kept the 21 frames" in said.replace("\n", " ")


def test_ctrl_c_ends_the_session_and_exits_with_130(tmp_path: Path) -> None:
    ended: list[Received] = []
    written = threading.Event()

    def script(conversation: Conversation) -> Iterator[Any]:
        yield chunk(conversation.next(), 0)
        while not (request := conversation.next()).end:
            written.set()  # it asks for more chunks
        ended.append(request)
        yield acknowledgement(request)

    with ScriptedTriton(script) as server:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "longlive_client.cli.generate",
                "--prompt",
                "a fox",
                "--name",
                "x",
                "--url",
                server.url,
            ]
            + ["--out", str(tmp_path)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert written.wait(LIMIT_S)
        os.kill(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert ended
    assert frame_count(tmp_path / "long" / "x.partial.mp4") == 9


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--prompt", "a", "--prompts", "b"],
        ["--prompts", "b", "--name", "x"],
        ["--prompt", "a", "--switch-at", "3"],
        ["--prompts", "b", "--switch-at", "soon"],
        ["--prompt", "a", "--config", "serve.toml"],
        ["--prompt", "a", "--serve", "--url", "127.0.0.1:1"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_the_latency_of_a_switch_counts_from_the_border_at_which_it_was_due() -> None:
    timing = Timing(started=100.0)
    for index, (arrived, prompt_index) in enumerate([(101, 0), (102, 0), (104.5, 1), (105, 1), (109, 2)]):
        frames = np.zeros((12 if index else 9, 2, 2, 3), np.uint8)
        timing.add(StreamedChunk(frames=frames, first_frame=0, prompt_index=prompt_index, arrived=arrived))
    timing.add(StreamedChunk(frames=frames[:0], first_frame=0, prompt_index=9, arrived=200.0, notice="hello"))
    assert timing.first_frame_s == 1
    assert timing.switch_latencies_s == [2.5, 4]
    assert (timing.frames, timing.wall_s) == (57, 9)
    assert timing.real_time_factor == pytest.approx(57 / 16 / 9)
