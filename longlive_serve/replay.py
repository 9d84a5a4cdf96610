# SPDX-License-Identifier: Apache-2.0
"""Replays a known case and compares the latents: `python -m longlive_serve.replay CASE.json`.

A case is CASE.json (sizes, switches, variant) and CASE.safetensors in the same folder (weights, noise, prompt
embeddings and the reference's latents). It checks a backend, a device or a dtype against a known result.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from longlive_serve.backends.base import Backends, DiTBackend, EncodedPrompt
from longlive_serve.backends.exported.graphs import load_graphs
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.backends.exported.modules import GraphDiT
from longlive_serve.backends.float64 import Float64, error, max_error
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import DIT, PRESETS, DiTConfig, ModelConfig, WindowConfig
from longlive_serve.config.serve_config import FUSED, TORCH, ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, Session
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.weights.checkpoint import load_strictly


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplayCase:
    """The settings of a case, from its JSON file. Frames are latent frames."""

    config: DiTConfig
    latent: tuple[int, int, int]
    """Channels, height, width."""
    chunks: int
    switches: tuple[int, ...] = ()
    """Requested frames, ascending: prompt k+1 starts with the first chunk at or after frame switches[k]."""
    relative: bool = False
    global_sink: bool = True
    window: int = 12
    sink: int = 3

    @classmethod
    def load(cls, path: Path) -> ReplayCase:
        """Read CASE.json. Raises ValueError that names the file and the key."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            fields = {field.name for field in dataclasses.fields(cls)}
            given = {key: values[key] for key in fields & values.keys()}
            sizes = {field.name for field in dataclasses.fields(DiTConfig)}
            dit = {key: value for key, value in values["config"].items() if key in sizes}
            given["config"] = DiTConfig(**dit, channels=values["latent"][0])
            return cls(**given | {key: tuple(given[key]) for key in ("latent", "switches") if key in given})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a case: {type(error).__name__}: {error}") from None

    @property
    def variant(self) -> str:
        return "infinity" if self.relative else "base"

    @property
    def model_config(self) -> ModelConfig:
        """The case as a model configuration; its text encoder and VAE are placeholders that are not run."""
        _, height, width = self.latent
        return ModelConfig(
            name="case",
            dit=self.config,
            vae=PRESETS["tiny"].vae,
            text_encoder=PRESETS["tiny"].text_encoder,
            latent_height=height,
            latent_width=width,
            window=WindowConfig(window=self.window, sink=self.sink),
        )


class GivenNoise:
    """The noise of a case in the order of use: `noise` [1, 3n, C, h, w], `renoise` [3n, 3, C, h, w]."""

    def __init__(self, noise: Tensor, renoise: Tensor) -> None:
        chunks = noise.shape[1] // renoise.shape[1]
        steps = len(renoise) // chunks
        first, later = noise.chunk(chunks, 1), renoise.split(steps)
        self._chunks = iter([torch.cat([one[None], more[:, None]]) for one, more in zip(first, later, strict=True)])

    def draw(self, shape: tuple[int, ...], draws: int) -> Tensor:
        drawn = next(self._chunks)
        assert drawn.shape == (draws, *shape), f"noise: got {tuple(drawn.shape)}, expected {(draws, *shape)}"
        return drawn

    def prepare(self, shape: tuple[int, ...], draws: int, pinned: bool) -> None:
        pass


class GivenEmbeddings:
    """A text encoder that returns the embeddings of a case for its prompts `p0`, `p1`, ..."""

    def __init__(self, embeds: dict[str, Tensor], device: str) -> None:
        self._embeds = {name: tensor.to(device) for name, tensor in embeds.items()}

    def encode(self, prompt: str) -> EncodedPrompt:
        embeds = self._embeds[prompt]
        tokens = int(embeds.ne(0).any(-1).sum())
        return EncodedPrompt(embeds=embeds, tokens=tokens, tokens_given=tokens)


class NoDecoder:
    """A VAE decoder that returns no frames: a case ends at the latents."""

    def initial_cache(self) -> list[Tensor]:
        return []

    def decode(self, latents: Tensor, cache: list[Tensor], is_first: bool) -> tuple[Tensor, list[Tensor]]:
        return torch.empty((0, 0, 0, 3), dtype=torch.uint8), cache


def case_model(case: ReplayCase, tensors: dict[str, Tensor]) -> CausalDiT:
    """The DiT with the weights of a case, float32 on the CPU."""
    model = CausalDiT(case.config)
    load_strictly(model, _with_prefix(tensors, "weights."), "weights")
    return model.eval()


def replay(case: ReplayCase, tensors: dict[str, Tensor], dit: DiTBackend, device: str = "cpu") -> Tensor:
    """Run a case through the model runner on `dit`; returns clean latents [1, 3n, C, h, w], float32 on the CPU."""
    backends = Backends(
        text_encoder=GivenEmbeddings(_with_prefix(tensors, "prompt_embeds."), device),
        dit=dit,
        vae_decoder=NoDecoder(),
        name="replay",
        device=device,
        dtype=str(dit.dtype).removeprefix("torch."),
    )
    session = Session(
        id="replay",
        prompt=Prompt(index=0, text="p0"),
        noise=GivenNoise(tensors["noise"], tensors["renoise"]),
        slot=0,
        global_sink=case.global_sink,
    )
    for index, frame in enumerate(case.switches):
        session.add_prompt(f"p{index + 1}", frame)
    runner = ModelRunner(backends, case.model_config, case.variant)
    latents = []
    for _ in range(case.chunks):
        runner.advance(session)
        latents.append(session.context_latents[-1].float().cpu())
    return torch.cat(latents, 1)


def exact_latents(case: ReplayCase, tensors: dict[str, Tensor]) -> Tensor:
    """`replay` with PyTorch on the CPU in float64: the reference for float32 results."""
    dit = TorchDiT(case_model(case, tensors).double(), case.model_config, 1, case.variant)
    with torch.inference_mode(), Float64():
        return replay(case, tensors, dit)


def rounding(case: ReplayCase, tensors: dict[str, Tensor]) -> float:
    """Tolerance of a case's latents in float32, from the float32 error of PyTorch on this CPU."""
    latents = replay(case, tensors, TorchDiT(case_model(case, tensors), case.model_config, 1, case.variant))
    return max_error(latents, exact_latents(case, tensors))


def load_case_tensors(case: ReplayCase, path: Path) -> dict[str, Tensor]:
    """Read CASE.safetensors. Raises ValueError that names a missing or wrongly shaped tensor."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    window = case.model_config.window
    video = (1, window.chunk * case.chunks, *case.latent)
    text = (1, case.config.text_len, case.config.text_dim)
    renoise = (3 * case.chunks, window.chunk, *case.latent)
    expected: dict[str, tuple[int, ...]] = {"noise": video, "latents": video, "renoise": renoise}
    expected |= {f"prompt_embeds.p{index}": text for index in range(len(case.switches) + 1)}
    for name, shape in expected.items():
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        if got != shape:
            raise ValueError(f"{path}: {name}: got {got}, expected {shape}")
    return tensors


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _dit(case: ReplayCase, tensors: dict[str, Tensor], arguments: argparse.Namespace) -> DiTBackend:
    if arguments.graphs is None:
        model = case_model(case, tensors).to(arguments.device, getattr(torch, arguments.dtype))
        if arguments.backend == TORCH:
            return TorchDiT(model, case.model_config, 1, case.variant)
        try:
            from longlive_serve.backends.fused.dit import FusedDiT  # needs Triton
        except ImportError as error:
            raise ValueError(f"--backend {FUSED}: {error}; Triton comes with PyTorch's builds for CUDA") from None
        fp8 = arguments.fp8 or arguments.fp8_attention
        return FusedDiT(model, case.model_config, 1, case.variant, fp8, arguments.fp8_attention)
    manifest = Manifest.read(arguments.graphs)
    manifest.check(manifest.backend, case.model_config, case.variant)
    graphs = load_graphs(DIT, manifest, arguments.device)
    return GraphDiT(graphs, case.model_config, 1, case.variant)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m longlive_serve.replay",
        description="Run a known case (given weights, noise and prompts) through the model runner and compare its "
        "latents with the given ones. Exits with 1 if they differ by more than the tolerance.",
    )
    parser.add_argument("case", type=Path, metavar="CASE.json", help="the case; CASE.safetensors is in the same folder")
    text = "relative to the largest latent (default: rounding of float32, measured against float64 on the CPU)"
    parser.add_argument("--tolerance", type=float, help=text)
    parser.add_argument("--device", default="cpu", help="a torch device, such as cpu or cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=ServeConfig.DTYPES[1:], default="float32", help="dtype of the torch backend")
    text = "the backend; fused on the CPU needs $TRITON_INTERPRET=1 (default: %(default)s)"
    parser.add_argument("--backend", choices=[TORCH, FUSED], default=TORCH, help=text)
    parser.add_argument("--fp8", action="store_true", help="with fused: GEMMs in FP8; set --tolerance as well")
    parser.add_argument("--fp8-attention", action="store_true", help="with fused: FP8 attention as well")
    text = "run these graphs or engines of the case (`python -m export.to_onnx --case CASE.json`) instead of torch"
    parser.add_argument("--graphs", type=Path, metavar="FOLDER", help=text)
    arguments = parser.parse_args(argv)
    if arguments.backend == FUSED and arguments.graphs is not None:
        parser.error(f"--graphs: got --backend {FUSED} as well, expected one of them")
    if (arguments.fp8 or arguments.fp8_attention) and arguments.backend != FUSED:
        parser.error(f"--fp8: got --backend {arguments.backend}, expected {FUSED}")
    try:
        case = ReplayCase.load(arguments.case)
        tensors = load_case_tensors(case, arguments.case.with_suffix(".safetensors"))
        latents = replay(case, tensors, _dit(case, tensors, arguments), arguments.device)
        tolerance = rounding(case, tensors) if arguments.tolerance is None else arguments.tolerance
    except (ValueError, RuntimeError) as refusal:  # a RuntimeError: a device that torch cannot use
        print(f"replay: {refusal}", file=sys.stderr)
        return 2
    error_ratio = error(latents, tensors["latents"])
    print(f"max_abs_err_over_max_abs: {error_ratio:.3e}")
    return 0 if error_ratio <= tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
