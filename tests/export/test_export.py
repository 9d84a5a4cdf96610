# SPDX-License-Identifier: Apache-2.0
"""Exported graphs: they compute what PyTorch computes, and the backend that runs them meets the golden rollouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.onnx_modules import exportable_graphs, write
from export.optimization_profiles import dit_calls, profiles_of
from export.to_onnx import export, main, source_of_config
from longlive_serve.backends.exported.graphs import load_graphs
from longlive_serve.backends.exported.io_spec import GRAPHS_OF, PROMPT_KV, graph_io
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.backends.registry import build_backends
from longlive_serve.config.presets import DIT, MODELS, PRESETS, WindowConfig
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from tests.conftest import ExportedGraphs
from tests.longlive_serve.test_replay import run_replay
from tests.support.cases import ROLLOUTS, write_case
from tests.support.shallow import shallow

SHIPPED = Path(__file__).parents[2] / "model_repository/longlive/1/demo"


@pytest.mark.numeric
@pytest.mark.parametrize("variant", ServeConfig.VARIANTS)
@pytest.mark.parametrize("preset", ["tiny", "demo"])
def test_every_graph_computes_what_pytorch_computes(
    tmp_path: Path, exported: ExportedGraphs, preset: str, variant: str
) -> None:
    models = MODELS if variant == "base" else (DIT,)
    if preset == "tiny":
        folder, written = exported(preset, variant), exported.written(preset, variant)
    else:
        config = ServeConfig(preset=preset, weights=str(SHIPPED), variant=variant)
        source = shallow(source_of_config(config), 1)
        folder, written = tmp_path, list(export(source, list(models), "float32", tmp_path, True))
    assert [graph.name for graph in written] == [name for model in models for name in GRAPHS_OF[model]]
    for graph in written:
        assert graph.comparison is not None, graph.name
        assert 0 < graph.comparison.error <= graph.comparison.tolerance < 1e-3, graph.name
        onnx.checker.check_model(folder / graph.file.file)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ROLLOUTS)
def test_a_golden_rollout_is_met(tmp_path: Path, case_graphs: Callable[[bool], Path], name: str) -> None:
    graphs = case_graphs(ROLLOUTS[name].get("relative", False))
    done = run_replay(write_case(tmp_path, name), "--graphs", graphs)
    assert done.returncode == 0, done.stdout + done.stderr


def test_another_window_is_refused(tmp_path: Path, case_graphs: Callable[[bool], Path]) -> None:
    done = run_replay(write_case(tmp_path, "dit_tiny_rollout", window=15), "--graphs", case_graphs(False))
    assert done.returncode == 2
    assert "window" in done.stderr


@pytest.mark.numeric
@pytest.mark.parametrize("variant", ServeConfig.VARIANTS)
def test_a_whole_session_is_that_of_torch(exported: ExportedGraphs, variant: str) -> None:
    """All that is exported as graphs, with a switch, against torch: frames within one step of 255."""
    folder = exported("tiny", variant)
    videos = []
    for backend in ("torch", "auto"):
        config = ServeConfig(variant=variant, backend=backend, graphs=str(folder), slots=2)
        backends = build_backends(config)
        session = Session(id="s", prompt=Prompt(index=0, text="a red fox runs"), noise=SeededNoise(1), slot=1)
        runner, frames = ModelRunner(backends, config.model_config, variant), []
        for chunk in range(8):
            if chunk == 5:
                session.add_prompt("a blue bird sleeps", NOW)
            frames.append(runner.advance(session).frames)
        videos.append(np.concatenate(frames).astype(int))
    assert backends.name == ("onnxruntime" if variant == "base" else "onnxruntime+torch")
    assert np.abs(videos[0] - videos[1]).max() <= 1
    assert videos[0].std() > 1


def test_the_cache_is_written_in_place_and_nowhere_else(exported: ExportedGraphs) -> None:
    sizes = PRESETS["tiny"]
    dit = load_graphs(DIT, Manifest.read(exported("tiny", "base")), "cpu")[DIT]
    (_, graph) = exportable_graphs(torch.nn.Module.eval(_tiny_dit()), sizes, "base")
    inputs = graph.example(batch=2, frames=3, used=9)
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    assert set(dit(inputs)) == {"flow"}
    rows = 3 * sizes.tokens_per_frame
    for name in dit.io.persistent:
        changed = (inputs[name] != before[name]).any(-1).any(1)  # [B, rows of the window]
        for session, first in enumerate(inputs["write_index"].tolist()):
            written = torch.zeros_like(changed[session])
            written[first : first + rows] = True
            assert torch.equal(changed[session], written), name


def _tiny_dit() -> torch.nn.Module:
    from longlive_serve.models.dit.causal_dit import CausalDiT

    return CausalDiT(PRESETS["tiny"].dit)


def test_sessions_of_a_batch_do_not_meet() -> None:
    cache, new = torch.zeros(2, 1, 6, 1), torch.ones(2, 1, 2, 1)
    assert write(cache, new, torch.tensor([0, 4])).flatten().tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]


def test_no_call_of_a_session_attends_to_frames_that_are_not_there() -> None:
    """Cold start: 3, 6, 9 frames; then the full window; recaches of all that is kept, or of all but the sink."""
    assert dit_calls(WindowConfig()) == [(3, 3), (3, 6), (3, 9), (3, 12), (6, 6), (9, 9), (9, 12), (12, 12)]
    table = graph_io(PRESETS["tiny"], "base")
    assert len(profiles_of(table[DIT], WindowConfig())) == 8
    assert profiles_of(table[PROMPT_KV], WindowConfig(), max_batch=4) == [{"batch": (1, 1, 4)}]


def test_graphs_of_another_variant_or_dtype_are_refused(exported: ExportedGraphs) -> None:
    folder = str(exported("tiny", "base"))
    with pytest.raises(ValueError, match="variant 'base' instead of 'infinity'"):
        build_backends(ServeConfig(backend="onnxruntime", graphs=folder, variant="infinity"))
    with pytest.raises(ValueError, match="expected it in dtype 'float16'"):
        build_backends(ServeConfig(backend="onnxruntime", graphs=folder, dtype="float16"))
    with pytest.raises(ValueError, match="backend 'onnxruntime' instead of 'tensorrt'"):
        build_backends(ServeConfig(backend="tensorrt", tensorrt_engines=folder))
    with pytest.raises(ValueError, match="not a manifest"):
        build_backends(ServeConfig(backend="onnxruntime", graphs="/nowhere"))


def test_graphs_of_other_weights_are_refused(exported: ExportedGraphs, tmp_path: Path) -> None:
    manifest = Manifest.read(exported("tiny", "base"))
    others = {name: dataclasses.replace(graph, weights="0" * 64) for name, graph in manifest.graphs.items()}
    dataclasses.replace(manifest, graphs=others).write(tmp_path)
    with pytest.raises(ValueError, match="was exported from other weights"):
        build_backends(ServeConfig(backend="onnxruntime", graphs=str(tmp_path)))


def test_an_engine_without_its_folder_is_an_error() -> None:
    with pytest.raises(ValueError, match="graphs: got nothing"):
        ServeConfig(backend="onnxruntime")
    with pytest.raises(ValueError, match="tensorrt_engines: got nothing"):
        ServeConfig(dit_backend="tensorrt")


def test_each_model_may_have_its_own_engine(exported: ExportedGraphs) -> None:
    folder = str(exported("tiny", "base"))
    backends = build_backends(ServeConfig(backend="torch", vae_decoder_backend="onnxruntime", graphs=folder))
    assert backends.name == "onnxruntime+torch"


def test_the_manifest_grows_model_by_model(tmp_path: Path) -> None:
    source = shallow(source_of_config(ServeConfig()), 1)
    for model, dtype in (("text_encoder", "float16"), ("dit", "bfloat16")):
        done = list(export(source, [model], dtype, tmp_path, check=True))
        assert all(graph.comparison is None for graph in done)  # these dtypes are not run
    dtypes = {name: graph.dtype for name, graph in Manifest.read(tmp_path).graphs.items()}
    assert dtypes == {"text_encoder": "float16", "prompt_kv": "bfloat16", "dit": "bfloat16"}


def test_the_command_prints_the_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "serve.toml"
    settings.write_text('preset = "tiny"\n')
    assert main(["--config", str(settings), "--out", str(tmp_path / "graphs"), "--models", "text_encoder"]) == 0
    printed = capsys.readouterr().out
    assert "text_encoder" in printed
    assert "e-0" in printed
