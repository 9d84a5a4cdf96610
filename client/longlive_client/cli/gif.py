# SPDX-License-Identifier: Apache-2.0
"""Turns a video into a GIF for a web page: `python -m longlive_client.cli.gif videos/story.mp4 story.gif`."""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import av
import av.filter


def write_gif(video: Path, gif: Path, *, fps: int = 8, width: int = 192) -> int:
    """Write `video` as an endlessly looping GIF, `width` pixels wide, with an optimal palette of 256 colors.

    Returns the number of frames. Raises OSError or ValueError (both name the file) if it is not a video.
    """
    with av.open(str(video)) as source:
        if not source.streams.video:
            raise ValueError(f"{video}: got no video in it")
        stream = source.streams.video[0]
        graph, sink = _graph(stream, fps, width)
        for frame in source.decode(stream):
            graph.push(frame)
        graph.push(None)
        gif.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(gif), "w", format="gif", options={"loop": "0"}) as container:
            out = container.add_stream("gif", rate=fps)
            count = 0
            while (image := _next(sink)) is not None:
                if not count:
                    out.width, out.height, out.pix_fmt = image.width, image.height, "pal8"
                container.mux(out.encode(image))
                count += 1
            container.mux(out.encode())
    return count


def _graph(stream: av.VideoStream, fps: int, width: int) -> tuple[av.filter.Graph, av.filter.FilterContext]:
    """fps -> scale -> (palette of the whole video) -> frames in that palette."""
    graph = av.filter.Graph()
    scaled = _chain(
        graph.add_buffer(template=stream), graph.add("fps", str(fps)), graph.add("scale", f"{width}:-1:flags=neighbor")
    )
    split, palette, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    scaled.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph, sink


def _chain(*filters: av.filter.FilterContext) -> av.filter.FilterContext:
    for one, next_filter in itertools.pairwise(filters):
        one.link_to(next_filter)
    return filters[-1]


def _next(sink: av.filter.FilterContext) -> av.VideoFrame | None:
    try:
        frame = sink.pull()
    except (av.error.BlockingIOError, av.error.EOFError):
        return None
    assert isinstance(frame, av.VideoFrame)
    return frame


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m longlive_client.cli.gif", description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("gif", type=Path)
    parser.add_argument("--fps", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=192, help="pixels (default: %(default)s)")
    args = parser.parse_args()
    try:
        frames = write_gif(args.video, args.gif, fps=args.fps, width=args.width)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.gif} ({frames} frames)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
