# SPDX-License-Identifier: Apache-2.0
"""Converts published weights to one folder: `python -m export.convert --weights FOLDER --out FOLDER`.

The output: a .safetensors file per model (text encoder, DiT with LoRA adapters merged, VAE decoder, tiny decoder if
there is one) in one dtype, the tokenizer, and config.json with the sources of all files. `weights` in serve.toml can
name this folder instead of the input; it loads as the same models.

Every file is written atomically. After an interruption, run the same command again to continue: existing files from
the same sources are kept. Other files are never overwritten.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from export.output_folder import FORMAT, MADE_BY, RECORD, check_folder, copy_folder, is_copied, is_there, write_record
from export.tensor_writer import DTYPES, size_of, write_tensors
from longlive_serve.config.presets import PRESETS, TINY_DECODER
from longlive_serve.config.serve_config import RANDOM_WEIGHTS, Adapter, ServeConfig
from longlive_serve.weights.checkpoint import MADE_OF, Checkpoint
from longlive_serve.weights.layouts import (
    CONVERTED_FILE,
    CONVERTED_TOKENIZER_FOLDER,
    QUANTIZED,
)
from longlive_serve.weights.loader import ModelLoader
from longlive_serve.weights.lora import rank_of
from longlive_serve.weights.tensor_files import files_of, sha256

OnBytes = Callable[[str, int], None]
EXAMPLES = """
examples:
  # The layout of the reference: FOLDER/wan_models/Wan2.1-T2V-1.3B and FOLDER/longlive_models/models, whose lora.pt is
  # merged into the DiT.
  python -m export.convert --weights FOLDER --out weights/longlive

  # Your own adapter on top, at 80 %. --lora replaces the default, so it lists lora.pt as well.
  python -m export.convert --weights FOLDER --out weights/style \\
      --lora FOLDER/longlive_models/models/lora.pt style.safetensors=0.8

  # The demo model, in float32.
  python -m export.convert --preset demo --weights model_repository/longlive/1/demo --dtype float32 --out weights/demo

then, in serve.toml: weights = "weights/longlive" and no `lora`, as it is merged; or first quantize the output:
  python -m quantization.quantize --config serve.toml --recipe fp8 --out weights/fp8
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A model to convert."""

    checkpoint: Checkpoint
    shapes: dict[str, torch.Size]
    """Shapes of its tensors, in the order of `checkpoint.tensors()`."""
    name: str
    """Name of the output file."""


def convert(
    config: ServeConfig,
    loader: ModelLoader,
    parts: Sequence[Part],
    dtype: torch.dtype,
    out: Path,
    on_bytes: OnBytes = lambda what, count: None,
) -> int:
    """Write `parts` and the tokenizer to the folder `out`; returns how many of these already existed.

    `on_bytes` is called with the current file and the number of bytes done since the last call; they add up to `work`.
    Raises ValueError instead of overwriting other files.
    """
    copy = out / CONVERTED_TOKENIZER_FOLDER
    assert loader.folder is not None
    tokenizer = loader.folder.tokenizer
    loader.load_tokenizer()  # checks it
    check_folder(config, out, sum(size_of(part.shapes, dtype) for part in parts))
    made = {part.name: _made_of(part, config, dtype, on_bytes) for part in parts}
    there = {part.name for part in parts if is_there(out / part.name, made[part.name])}
    copied = is_copied(tokenizer, copy)
    out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        if part.name in there:
            on_bytes(part.name, size_of(part.shapes, dtype))
            continue
        about = {MADE_OF: json.dumps(made[part.name]), "format": "pt"}
        on_written = functools.partial(on_bytes, part.name)
        write_tensors(out / part.name, part.shapes, part.checkpoint.tensors(), dtype, about, on_written)
    if not copied:
        copy_folder(tokenizer, copy)
    if len(there) < len(parts) or not copied or not (out / RECORD).exists():
        write_record(config, out, made)
    return len(there) + copied


def parts_of(loader: ModelLoader) -> list[Part]:
    """The models in the loader's folder, each checked against its sizes. Raises ValueError."""
    if loader.folder is None:
        raise ValueError(f"weights: got {RANDOM_WEIGHTS!r}, expected a folder of weights to convert")
    parts = []
    for name, file in loader.folder.files.items():
        if name == TINY_DECODER and not file.path.exists():
            continue
        if file.kind == QUANTIZED:
            raise ValueError(f"{file.path}: got quantized weights, expected others: convert first, then quantize")
        checkpoint = loader.checkpoint(name)
        assert checkpoint is not None
        checkpoint.tensors()  # checks all tensors without reading them
        shapes = {key: tensor.shape for key, tensor in checkpoint.state().items()}
        parts.append(Part(checkpoint=checkpoint, shapes=shapes, name=CONVERTED_FILE.format(name)))
    return parts


def work(parts: Sequence[Part], dtype: torch.dtype) -> int:
    """The total of bytes reported to `on_bytes`: bytes to hash and bytes to write."""
    sources = [path for part in parts for path in _sources(part.checkpoint)]
    return sum(path.stat().st_size for path in sources) + sum(size_of(part.shapes, dtype) for part in parts)


def _sources(checkpoint: Checkpoint) -> list[Path]:
    return [*files_of(checkpoint.file.path), *(adapter.path for adapter in checkpoint.adapters)]


def _made_of(part: Part, config: ServeConfig, dtype: torch.dtype, on_bytes: OnBytes) -> dict[str, Any]:
    """The origin of a file: equal origins give equal files."""

    def hashed(path: Path) -> str:
        return sha256(path, lambda count: on_bytes(f"{path.name} (hash)", count))

    checkpoint, folder = part.checkpoint, Path(config.weights)
    sources = [
        {"file": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": hashed(path)}
        for path in files_of(checkpoint.file.path)
    ]
    lora: list[dict[str, Any]] = list(checkpoint.origin().get("lora", ()))  # of a folder converted before
    for adapter in checkpoint.adapters:
        facts = {"scale": adapter.scale, "alpha": adapter.alpha or float(rank_of(adapter)), "rank": rank_of(adapter)}
        lora.append({"file": adapter.path.name, "sha256": hashed(adapter.path)} | facts)
    return {
        "made_by": MADE_BY,
        "format": FORMAT,
        "preset": config.preset,
        "dtype": str(dtype).removeprefix("torch."),
        "sources": sources,
        "lora": lora,
        "use_ema": checkpoint.use_ema,
    }


def _adapter(text: str, alpha: float) -> Adapter:
    """Parses `FILE=SCALE` or `FILE`, whose name may contain "=". Raises ValueError."""
    file, _, last = text.rpartition("=")
    try:
        scale = float(last)
    except ValueError:
        file, scale = text, 1.0
    try:
        return Adapter(path=Path(file or text), scale=scale if file else 1.0, alpha=alpha)
    except ValueError as error:
        raise ValueError(f"--lora {text}: {error}") from None


def _adapters(arguments: argparse.Namespace) -> tuple[Adapter, ...]:
    if arguments.lora_alpha and not arguments.lora:
        raise ValueError("--lora-alpha: got no --lora, expected --lora with the adapters it applies to")
    return tuple(_adapter(text, arguments.lora_alpha) for text in arguments.lora)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog=EXAMPLES,
    )
    text = "the folder to convert, in any layout supported by `weights` in serve.toml"
    parser.add_argument("--weights", metavar="FOLDER", required=True, help=text)
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="the output folder; it may exist")
    text = "adapters to merge into the DiT (default: lora.pt beside longlive_base.pt, if it exists)"
    parser.add_argument("--lora", nargs="+", metavar="FILE[=SCALE]", default=[], help=text)
    text = "the alpha used in training of these adapters (default: their rank)"
    parser.add_argument("--lora-alpha", type=float, metavar="ALPHA", default=0.0, help=text)
    parser.add_argument("--use-ema", action="store_true", help="convert the averaged weights of longlive_base.pt")
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    parser.add_argument("--dtype", choices=names, default="bfloat16", help="default: %(default)s, as the reference")
    text = "sizes of the models (default: %(default)s)"
    parser.add_argument("--preset", choices=list(PRESETS), default="longlive-1.3b", help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    columns = (TextColumn("{task.description:32}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        config = ServeConfig(
            preset=arguments.preset,
            weights=arguments.weights,
            lora=_adapters(arguments),
            use_ema=arguments.use_ema,
        )
        dtype = getattr(torch, arguments.dtype)
        loader = ModelLoader.from_config(config)
        parts = parts_of(loader)
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("checking files", total=work(parts, dtype))

            def on_bytes(what: str, count: int) -> None:
                bar.update(task, description=what, advance=count)

            skipped = convert(config, loader, parts, dtype, arguments.out, on_bytes)
    except ValueError as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"convert: {error}; run the same command again to continue", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert: stopped; run the same command again to continue", file=sys.stderr)
        return 130
    for name, file in json.loads((arguments.out / RECORD).read_text(encoding="utf-8"))["files"].items():
        print(f"{file['bytes'] / 1e6:10.1f} MB  {arguments.out / name}")
    print(f"{skipped} already existed" if skipped else "all files are new")
    print(f'serve it with  preset = "{config.preset}", weights = "{arguments.out.absolute()}"  in a serve.toml')
    return 0


if __name__ == "__main__":
    sys.exit(main())
