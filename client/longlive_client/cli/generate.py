# SPDX-License-Identifier: Apache-2.0
"""Writes videos: `python -m longlive_client.cli.generate --prompt "..."` or `--prompts scenes.jsonl`.

Writes a video of one prompt to `videos/long/<name>.mp4`, and each scene of a file to `videos/interactive/<name>.mp4`.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

from longlive_client.cli.contact_sheet import ContactSheet
from longlive_client.cli.mp4_writer import VideoFile
from longlive_client.cli.scenes import Scene, load_scenes
from longlive_client.cli.timing import Timing
from longlive_client.errors import VideoStreamError
from longlive_client.grpc_transport import DEFAULT_URL, add_access_arguments, get_tls
from longlive_client.video_stream import StreamedChunk, VideoStream
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, ServeConfig
from longlive_serve.protocol.session_options import ASAP, FORMATS, ON_SWITCH, PACES

DEFAULT_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after an error, 130 after Ctrl-C."""
    args = _arguments(argv)
    results: dict[Path, Timing] = {}
    try:
        scenes = _scenes(args)
        with _server_url(args) as url:
            _generate(args, scenes, url, results)
    except VideoStreamError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 1
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        if results:
            Console().print(_table(results))
            for path in results:
                print(f"wrote {path}")
    return 0


def _generate(args: argparse.Namespace, scenes: list[Scene], url: str, results: dict[Path, Timing]) -> None:
    """Generate the videos one after another. `results` gets an entry for each complete one."""
    folder = args.out / ("interactive" if args.prompts else "long")
    sheet = ContactSheet()
    with _progress() as progress:
        for number, scene in enumerate(scenes):
            file = VideoFile(folder / f"{scene.name}.mp4", crf=args.crf)
            try:
                results[file.path] = _record(scene, number, file, _stream(scene, url, args), progress, sheet)
            except BaseException:
                if file.frames:
                    _print(progress, f"{file.partial_path}: kept the {file.frames} frames received")
                raise
    if args.contact_sheet is not None:
        sheet.write(args.contact_sheet)


def _record(
    scene: Scene, number: int, file: VideoFile, stream: VideoStream, progress: Progress, sheet: ContactSheet
) -> Timing:
    task = progress.add_task(scene.name, total=scene.chunks, fps="", prompt=scene.prompts[0])
    timing = Timing()
    with file, stream as video:
        for chunk in _play(scene, video):
            if chunk.notice:
                _print(progress, f"{scene.name}: {chunk.notice}")
            if len(chunk.frames):
                timing.add(chunk)
                file.write(chunk.frames)
                sheet.add(number, chunk.prompt_index, chunk.frames[len(chunk.frames) // 2])
                prompt = scene.prompts[chunk.prompt_index]
                progress.update(task, advance=int(chunk.completes), fps=f"{timing.fps:.1f} fps", prompt=prompt)
    return timing


def _stream(scene: Scene, url: str, args: argparse.Namespace) -> VideoStream:
    return VideoStream(
        scene.prompts[0],
        url=url,
        seed=scene.seed,
        # A scene with switches requests one chunk first, so that the server knows all switches before the second
        # chunk: the video then does not depend on the server's speed.
        chunks=1 if scene.switch_at else scene.chunks,
        global_sink=args.global_sink,
        on_switch=args.on_switch,
        pace=args.pace,
        frame_format=args.format,
        stream_partial_chunks=args.stream_partial_chunks,
        stall_timeout=args.stall_timeout,
        tls=args.tls,
        access_token=args.access_token,
    )


def _play(scene: Scene, video: VideoStream) -> Iterator[StreamedChunk]:
    for text, frame in zip(scene.prompts[1:], scene.switch_latent_frames, strict=True):
        video.switch_prompt(text, at_latent_frame=frame)
    if scene.switch_at:
        video.request_chunks(scene.chunks - 1)
    return video.chunks()


def _scenes(args: argparse.Namespace) -> list[Scene]:
    if args.prompts is not None:
        return load_scenes(args.prompts, switch_at=args.switch_at, seconds=args.seconds, seed=args.seed)
    words = "-".join(re.findall(r"[a-z0-9]+", args.prompt.lower()))[:48].strip("-")
    name = f"{words or 'video'}-{args.seed}" if args.name is None else args.name.removesuffix(".mp4")
    seconds = DEFAULT_SECONDS if args.seconds is None else args.seconds
    return [Scene(name=name, prompts=(args.prompt,), seconds=seconds, seed=args.seed)]


@contextlib.contextmanager
def _server_url(args: argparse.Namespace) -> Iterator[str]:
    if not args.serve:
        yield args.url or DEFAULT_URL
        return
    from longlive_serve.triton_server.launcher import TritonServer  # imported here, because the client runs without it

    server = TritonServer(config=args.config)
    print(f"starting a server with {server.config} ...", file=sys.stderr)
    with server:
        config = ServeConfig.from_toml(server.config)
        if config.weights == RANDOM_WEIGHTS:
            print(f"preset {config.preset} with random weights: the video will show noise", file=sys.stderr)
        yield server.grpc_url


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.completed}/{task.total} chunks"),
        TextColumn("{task.fields[fps]}"),
        TextColumn("{task.fields[prompt]}", markup=False, style="italic", table_column=Column(ratio=1, no_wrap=True)),
        console=Console(stderr=True),
        expand=True,
    )


def _print(progress: Progress, text: str) -> None:
    progress.console.print(Text(text))


def _table(results: dict[Path, Timing]) -> Table:
    video = Column("video", overflow="fold")
    table = Table(video, "frames", "wall s", "real-time\nfactor", "first\nframe s", "switch\nlatency s")
    for path, timing in results.items():
        table.add_row(
            Text(path.stem),
            str(timing.frames),
            f"{timing.wall_s:.2f}",
            f"{timing.real_time_factor:.2f}",
            "-" if timing.first_frame_s is None else f"{timing.first_frame_s:.2f}",
            ", ".join(f"{latency:.2f}" for latency in timing.switch_latencies_s) or "-",
        )
    return table


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m longlive_client.cli.generate", description=__doc__)
    prompt_group = parser.add_mutually_exclusive_group(required=True)
    prompt_group.add_argument("--prompt", help="generate one video of this prompt")
    prompt_group.add_argument("--prompts", type=Path, metavar="JSONL", help="generate a video of each line in a file")
    parser.add_argument("--name", help="name of the video (with --prompt; default: words of the prompt and the seed)")
    parser.add_argument(
        "--switch-at",
        type=_seconds_list,
        metavar="S,S",
        help="times of the prompt switches in seconds, for lines that have none (default: every 10)",
    )
    parser.add_argument("--seconds", type=float, help="length (default: 30; in a file, last switch + 10)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--global-sink",
        action=argparse.BooleanOptionalAction,
        help="keep the attention sink of the first prompt at a switch (default: the server's)",
    )
    parser.add_argument(
        "--on-switch",
        choices=ON_SWITCH,
        help="what a prompt switch does to the KV cache: rebuild it, keep it or drop it (default: recache)",
    )
    parser.add_argument(
        "--pace",
        choices=PACES,
        default=ASAP,
        help="asap: in the time that live sessions leave; realtime: with a playback clock (default: asap)",
    )
    parser.add_argument("--format", choices=FORMATS, help="encoding of the frames on the wire (default: raw)")
    parser.add_argument("--stream-partial-chunks", action="store_true", help="receive frames as they are decoded")
    server_group = parser.add_mutually_exclusive_group()
    server_group.add_argument("--url", help=f"the server's gRPC address (default: {DEFAULT_URL})")
    server_group.add_argument("--serve", action="store_true", help="start a server for this run")
    parser.add_argument("--config", type=Path, metavar="TOML", help="settings of that server (with --serve)")
    parser.add_argument("--out", type=Path, default=Path("videos"), help="output folder (default: videos)")
    parser.add_argument("--crf", type=int, default=18, help="x264 quality, 0 (lossless) to 51 (default: 18)")
    parser.add_argument("--contact-sheet", type=Path, metavar="PNG", help="also write frames of each prompt in rows")
    parser.add_argument(
        "--stall-timeout", type=float, default=30.0, metavar="S", help="fail after S seconds of silence (default: 30)"
    )
    add_access_arguments(parser)
    args = parser.parse_args(argv)
    args.tls = get_tls(parser, args)
    if args.name is not None and args.prompts is not None:
        parser.error('--name needs --prompt; in a file, each line may have a "name"')
    if args.switch_at is not None and args.prompt is not None:
        parser.error("--switch-at needs --prompts")
    if args.config is not None and not args.serve:
        parser.error("--config needs --serve")
    return args


def _seconds_list(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
