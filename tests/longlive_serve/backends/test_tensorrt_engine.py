# SPDX-License-Identifier: Apache-2.0
"""The real code of `tensorrt_session.py` on the CPU: addresses, slots in place, profiles, CUDA graphs, refusals.

What is stood in for: TensorRT's runtime, by ONNX Runtime on the addresses that the engine sets (`tensorrt_on_cpu.py`);
CUDA's streams, by doing everything at once, and its graphs, by executing again what was captured (`cuda_on_cpu.py`).
So this shows nothing of TensorRT's own arithmetic, of timing, or of what runs beside what.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.onnx_modules import exportable_graphs
from longlive_serve.backends.exported.graphs import load_graphs
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.backends.exported.modules import GraphDiT, GraphVAEDecoder
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchVAEDecoder
from longlive_serve.config.presets import DIT, PRESETS, VAE_DECODER
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.replay import ReplayCase, exact_latents, load_case_tensors, replay
from longlive_serve.weights.loader import load_model
from tests.conftest import ExportedGraphs
from tests.fakes.cuda_on_cpu import Cuda
from tests.fakes.tensorrt_on_cpu import tensorrt_on_cpu, write_engines
from tests.support.cases import ROLLOUTS, write_case
from tests.support.tolerance import Float64, assert_as_near, assert_reference

pytestmark = pytest.mark.numeric

TINY = PRESETS["tiny"]


@pytest.fixture
def graphs(exported: ExportedGraphs) -> Path:
    return exported("tiny", "base")  # before `cuda`: the exporter asks torch for its real devices


@pytest.fixture(autouse=True)
def cuda(graphs: Path) -> Iterator[Cuda]:
    with tensorrt_on_cpu() as state:
        yield state


@pytest.fixture
def engines(graphs: Path, tmp_path: Path) -> Path:
    return write_engines(graphs, tmp_path / "engines")


def open_dit(engines: Path) -> Any:
    return load_graphs(DIT, Manifest.read(engines), "cpu")[DIT]


def example(frames: int = 3, used: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    graphs = exportable_graphs(load_model(DIT, TINY, "random", "cpu", torch.float32), TINY, "base")
    return graphs[1].example(batch=1, frames=frames, used=used, seed=seed)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_golden_rollout_is_met(tmp_path: Path, case_graphs: Callable[[bool], Path], cuda: Cuda, name: str) -> None:
    engines = write_engines(case_graphs(ROLLOUTS[name].get("relative", False)), tmp_path / "engines")
    path = write_case(tmp_path, name)
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    graphs = load_graphs(DIT, Manifest.read(engines), "cpu")
    with torch.inference_mode():
        latents = replay(case, tensors, GraphDiT(graphs, case.model_config, 1, case.variant))
    assert_reference(latents, tensors["latents"], exact_latents(case, tensors))
    assert cuda.replayed > cuda.executed, "the calls of a full window are replayed"


def test_a_session_is_that_of_torch_whatever_runs_beside_it(engines: Path) -> None:
    """Text encoder, DiT and VAE as engines: two sessions take turns, one switches its prompt."""
    videos = {}
    for backend in ("torch", "tensorrt"):
        config = ServeConfig(backend=backend, tensorrt_engines=str(engines), slots=2, device="cpu")
        backends = build_backends(config)
        runner = ModelRunner(backends, config.model_config, config.variant)
        sessions = [
            Session(id=f"{slot}", prompt=Prompt(index=0, text=text), noise=SeededNoise(slot), slot=slot)
            for slot, text in enumerate(("a red fox runs", "a blue bird sleeps"))
        ]
        frames: list[list[np.ndarray]] = [[], []]  # type: ignore[type-arg]
        for chunk in range(7):
            if chunk == 5:
                sessions[1].add_prompt("a green frog sits", NOW)
            for slot, session in enumerate(sessions):
                frames[slot].append(runner.advance(session).frames)
        videos[backend] = np.stack([np.concatenate(part) for part in frames]).astype(int)
    assert np.abs(videos["torch"] - videos["tensorrt"]).max() <= 1
    assert videos["torch"].std() > 1


def test_video_is_that_of_torch(engines: Path) -> None:
    graphs = load_graphs(VAE_DECODER, Manifest.read(engines), "cpu")
    model = load_model(VAE_DECODER, TINY, "random", "cpu", torch.float32)
    made, plain = [], TorchVAEDecoder(model, TINY)
    ways = ((GraphVAEDecoder(graphs), False), (plain, False), (plain, True))
    for decoder, exactly in ways:
        shape = (1, 3, 16, TINY.latent_height, TINY.latent_width)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        cache, frames = decoder.initial_cache(), []
        with torch.inference_mode(), Float64() if exactly else contextlib.nullcontext():
            for chunk in range(3):
                video, cache = decoder.decode(latents, cache, chunk == 0)
                frames.append(video.numpy())
        made.append((np.concatenate(frames).astype(int), cache))
    (video, cache), (expected, expected_cache), (_, exact_cache) = made
    assert video.shape == expected.shape == (9 + 12 + 12, *TINY.video_size, 3)
    assert np.abs(video - expected).max() <= 1  # float32 errs by less than the steps between pixels' values
    for got, right, exact in zip(cache, expected_cache, exact_cache, strict=True):
        assert_as_near(got, right, exact)


def test_repeated_calls_become_a_cuda_graph_that_sees_new_inputs(engines: Path, cuda: Cuda) -> None:
    dit, inputs = open_dit(engines), example()
    counts, flows = [], []
    for call in range(5):
        inputs["latents"] = torch.randn(inputs["latents"].shape, generator=torch.Generator().manual_seed(call))
        flows.append(dit(inputs)["flow"])
        counts.append((cuda.executed, cuda.captured, cuda.replayed))
    assert counts == [(1, 0, 0), (2, 1, 0), (2, 1, 1), (2, 1, 2), (2, 1, 3)]
    fresh = open_dit(engines)
    for call, flow in enumerate(flows):
        inputs["latents"] = torch.randn(inputs["latents"].shape, generator=torch.Generator().manual_seed(call))
        assert torch.equal(flow, fresh({name: tensor.clone() for name, tensor in inputs.items()})["flow"])
    assert not torch.equal(flows[0], flows[1]), "an output is the caller's, and stays as it is"


def test_a_cuda_graph_belongs_to_its_slot_and_the_least_used_goes(
    engines: Path, cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longlive_serve.backends.exported import tensorrt_session

    monkeypatch.setattr(tensorrt_session, "CUDA_GRAPHS_KEPT", 2)
    slots = [example(seed=seed) for seed in range(3)]
    expected = [open_dit(engines)({name: tensor.clone() for name, tensor in slot.items()})["flow"] for slot in slots]
    dit, counts = open_dit(engines), []
    for slot in (0, 1, 0, 1, 0, 1, 2, 0):
        before = cuda.executed, cuda.captured, cuda.replayed
        assert torch.equal(dit(slots[slot])["flow"], expected[slot])
        after = cuda.executed, cuda.captured, cuda.replayed
        counts.append(tuple(new - old for new, old in zip(after, before, strict=True)))
    run, capture, repeat = (1, 0, 0), (1, 1, 0), (0, 0, 1)
    assert counts == [run, run, capture, capture, repeat, repeat, run, run], "the third takes the first one's place"


def test_a_call_that_no_profile_has_is_refused(engines: Path) -> None:
    with pytest.raises(ValueError, match=r"got a call with .*'frames': 6, 'used': 12.*Build it again"):
        open_dit(engines)(example(frames=6, used=12))


def test_what_tensorrt_says_is_in_the_error(engines: Path, cuda: Cuda) -> None:
    dit = open_dit(engines)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="illegal memory access"):
        dit(example())


def test_all_engines_share_one_block_of_memory(engines: Path, cuda: Cuda) -> None:
    for graph in (open_dit(engines), open_dit(engines)):
        for used in (3, 9):
            graph(example(used=used))
    assert len(cuda.blocks) == 1


def test_weights_that_stay_with_the_host_are_fetched_through_memory_of_their_own(graphs: Path, tmp_path: Path) -> None:
    dit = open_dit(write_engines(graphs, tmp_path / "engines", weights_mb=3))
    assert dit.engine.weight_streaming_budget_v2 == 3 << 20
    assert set(dit(example())) == {"flow"}


@pytest.mark.parametrize(
    ("built", "said"),
    [
        ({"tensorrt": "10.15.0"}, "tensorrt '10.15.0', here '10.16.0'. Build it here: python -m export.to_tensorrt"),
        ({"gpu": "NVIDIA L4", "compute_capability": "8.9"}, "gpu 'NVIDIA L4', here 'NVIDIA H200'; compute_capability"),
        ({"sha256": "0"}, "is not the engine that the manifest describes. Build it again"),
    ],
)
def test_an_engine_of_another_machine_is_refused(
    graphs: Path, tmp_path: Path, built: dict[str, str], said: str
) -> None:
    engines = write_engines(graphs, tmp_path / "engines", **built)
    with pytest.raises(ValueError, match=said):
        open_dit(engines)


def test_an_engine_that_is_gone_or_broken_is_refused(engines: Path) -> None:
    (engines / "dit.engine").unlink()
    with pytest.raises(ValueError, match=r"dit.engine: cannot be read.*Build it"):
        open_dit(engines)
    shutil.copy(engines / "vae_steady.engine", engines / "dit.engine")
    _take_as_it_is(engines, "dit")
    with pytest.raises(ValueError, match=r"got tensors \['cache.0'.*expected \['flow'"):
        open_dit(engines)
    (engines / "dit.engine").write_text("no engine")
    _take_as_it_is(engines, "dit")
    with pytest.raises(ValueError, match="cannot load it: magic tag does not match"):
        open_dit(engines)


def _take_as_it_is(engines: Path, name: str) -> None:
    """Let the manifest describe the file that is there."""
    from longlive_serve.weights.tensor_files import sha256

    manifest = json.loads((engines / "manifest.json").read_text(encoding="utf-8"))
    manifest["graphs"][name]["built"]["sha256"] = sha256(engines / f"{name}.engine")
    (engines / "manifest.json").write_text(json.dumps(manifest))


def test_without_a_gpu_nothing_is_loaded(engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="got no GPU"):
        open_dit(engines)
