# SPDX-License-Identifier: Apache-2.0
"""TensorRT's own parser and builder on our graphs: TensorRT for RTX has both without a GPU. No engine is run here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.progress import Progress
from torch import nn

from export.to_onnx import Source, export
from longlive_serve.backends.exported import tensorrt_library
from longlive_serve.backends.exported.graphs import load_graphs
from longlive_serve.backends.exported.io_spec import PROMPT_KV, GraphIO, GraphTensor, graph_io
from longlive_serve.backends.exported.manifest import Manifest
from longlive_serve.config.presets import DIT, MODELS, PRESETS, WindowConfig
from longlive_serve.models.quantization.int8_fp8_layers import install, scale_for, to_8_bit
from longlive_serve.weights.loader import load_model
from tests.fakes.tensorrt_on_cpu import without_tensorrt

RTX = tensorrt_library.TENSORRT_RTX
try:
    with without_tensorrt():
        tensorrt_library.use(RTX)
except ValueError as error:
    pytest.skip(f"needs TensorRT for RTX (extra `dev`): {error}", allow_module_level=True)
TINY = PRESETS["tiny"]
SMALL = dataclasses.replace(
    TINY,
    dit=dataclasses.replace(TINY.dit, num_layers=1),
    vae=dataclasses.replace(TINY.vae, num_res_blocks=0),
    window=WindowConfig(window=6),
)


@pytest.fixture(autouse=True)
def rtx() -> Iterator[None]:
    with without_tensorrt():
        tensorrt_library.use(RTX)
        yield


def source(bits: torch.dtype | None = None) -> Source:
    """Random weights; the linear layers of the DiT's blocks in `bits`, for inputs up to 4."""

    def load(name: str, dtype: torch.dtype) -> nn.Module:
        model: nn.Module = load_model(name, SMALL, "random", "cpu", dtype)
        states = {}
        for layer, module in model.named_modules():
            if bits and layer.startswith("blocks.") and isinstance(module, nn.Linear):
                weight = module.weight.detach().float()
                scale, of_inputs = scale_for(weight.abs().amax(1), bits), scale_for(torch.tensor(4.0), bits)
                quantized = to_8_bit(weight, scale[:, None], bits)
                states[layer] = {"quantized_weight": quantized, "weight_scale": scale, "input_scale": of_inputs}
        install(model, states)
        return model

    recipe = str(bits or "")
    return Source(sizes=SMALL, variant="base", load=load, fingerprint=lambda _: "random", recipe=lambda _: recipe)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All graphs in bfloat16."""
    folder = tmp_path_factory.mktemp("bf16")
    list(export(source(), list(MODELS), "bfloat16", folder, check=False))
    return folder


@pytest.fixture(scope="module", params=[torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
def quantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.dtype, Path]:
    """The DiT's graphs with 8-bit layers."""
    folder = tmp_path_factory.mktemp("quantized")
    list(export(source(request.param), [DIT], "bfloat16", folder, check=False))
    return request.param, folder


def build(graphs: Path, out: Path, only: list[str] | None = None, **options: Any) -> dict[str, bool]:
    """Build; which engines were there already."""
    from export.tensorrt_builder import Options
    from export.to_tensorrt import build as build_engines

    with Progress(disable=True) as progress:
        done = build_engines(graphs, out, only or [], RTX, Options(**options), progress)
        return {built.name: built.reused for built in done}


def test_every_graph_becomes_an_engine(graphs: Path, tmp_path: Path) -> None:
    made = build(graphs, tmp_path, max_batch=2)
    assert made == dict.fromkeys(graph_io(SMALL, "base"), False)
    manifest = Manifest.read(tmp_path)
    manifest.check("tensorrt", SMALL, "base")
    profiles = manifest.graphs[DIT].built["profiles"]
    assert [(profile["frames"][0], profile["used"][0]) for profile in profiles] == [(3, 3), (3, 6), (6, 6)]
    assert all(profile["batch"] == [1, 1, 2] for profile in profiles)


def test_quantized_graphs_become_engines(quantized: tuple[torch.dtype, Path], tmp_path: Path) -> None:
    assert build(quantized[1], tmp_path) == {PROMPT_KV: False, DIT: False}
    assert Manifest.read(tmp_path).graphs[DIT].quantization == str(quantized[0])


def test_zero_points_are_zero_and_of_8_bits_with_sign(quantized: tuple[torch.dtype, Path]) -> None:
    """TensorRT takes uint8 ones for int8, and says nothing."""
    bits, folder = quantized
    expected = {torch.int8: TensorProto.INT8, torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN}[bits]
    for name in (PROMPT_KV, DIT):
        points = zero_points(onnx.load(folder / f"{name}.onnx"))
        assert points
        assert {point.data_type for point in points} == {expected}, name
        assert not any(numpy_helper.to_array(point).astype(np.float32).any() for point in points), name


def zero_points(model: onnx.ModelProto) -> list[TensorProto]:
    """Those of all QuantizeLinear and DequantizeLinear; each must have one that is stored as it is."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    return [stored[node.input[2]] for node in nodes]


Tensors = list[tuple[str, int, list[int]]]
ROWS: Tensors = [
    ("cache", TensorProto.BFLOAT16, [1, 2, 64, 64]),
    ("new", TensorProto.BFLOAT16, [1, 2, 8, 64]),
    ("at", TensorProto.INT64, [1]),
]


def write_node(path: Path, operator: str, inputs: Tensors, output: int, constants: Any = (), **attributes: Any) -> Path:
    """A graph of one node, called `the_node`."""
    given = [helper.make_tensor_value_info(*tensor) for tensor in inputs]
    stored = [numpy_helper.from_array(array, f"constant{index}") for index, array in enumerate(constants)]
    names = [tensor.name for tensor in given] + [tensor.name for tensor in stored]
    node = helper.make_node(operator, names, ["out"], name="the_node", **attributes)
    out = helper.make_tensor_value_info("out", output, None)
    graph = helper.make_graph([node], "graph", given, [out], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10), path)
    return path


def build_node(path: Path, inputs: Tensors) -> memoryview:
    from export.tensorrt_builder import Options, build_engine

    io = GraphIO(name="graph", inputs=tuple(GraphTensor(name, tuple(sizes)) for name, _, sizes in inputs), outputs=())
    with Progress(disable=True) as progress:
        return build_engine(path, io, [{}], Options(), None, progress)


def test_a_linear_write_into_the_cache_is_taken_a_circular_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    write_node(path, "TensorScatter", ROWS, TensorProto.BFLOAT16, axis=-2, mode="linear")
    assert len(build_node(path, ROWS)) > 0
    write_node(path, "TensorScatter", ROWS, TensorProto.BFLOAT16, axis=-2, mode="circular")
    with pytest.raises(ValueError, match=r"graph.onnx: TensorRT cannot read it:\n  the_node \(TensorScatter\).*linear"):
        build_node(path, ROWS)


def test_mixed_dtypes_are_refused(tmp_path: Path) -> None:
    inputs: Tensors = [("a", TensorProto.BFLOAT16, [4, 8]), ("b", TensorProto.FLOAT16, [8, 4])]
    path = write_node(tmp_path / "graph.onnx", "MatMul", inputs, TensorProto.BFLOAT16)
    with pytest.raises(ValueError, match=r"the_node \(MatMul\): Invalid Node"):
        build_node(path, inputs)


def test_a_zero_point_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    inputs: Tensors = [("x", TensorProto.FLOAT, [4, 8])]
    constants = np.float32(0.1), np.int8(1)
    path = write_node(tmp_path / "graph.onnx", "QuantizeLinear", inputs, TensorProto.INT8, constants)
    with pytest.raises(ValueError, match=r"the_node \(QuantizeLinear\).*Non-zero zero point"):
        build_node(path, inputs)


def test_attention_in_float32_is_refused(tmp_path: Path) -> None:
    inputs: Tensors = [(name, TensorProto.FLOAT, [1, 2, 64, 64]) for name in "qkv"]
    path = write_node(tmp_path / "graph.onnx", "Attention", inputs, TensorProto.FLOAT)
    with pytest.raises(ValueError, match=r"cannot build it: .*not supported by a dedicated kernel"):
        build_node(path, inputs)


def test_engines_are_built_again_when_what_they_are_made_of_changes(graphs: Path, tmp_path: Path) -> None:
    assert build(graphs, tmp_path, [PROMPT_KV]) == {PROMPT_KV: False}
    assert build(graphs, tmp_path, [PROMPT_KV]) == {PROMPT_KV: True}
    assert build(graphs, tmp_path, [PROMPT_KV], weights_mb=1, workspace_mb=64) == {PROMPT_KV: False}
    assert build(graphs, tmp_path, [PROMPT_KV], optimization_level=2) == {PROMPT_KV: False}
    engine = tmp_path / "prompt_kv.engine"
    engine.write_bytes(engine.read_bytes()[:-1])
    assert build(graphs, tmp_path, [PROMPT_KV], optimization_level=2) == {PROMPT_KV: False}
    changed = tmp_path / "graphs"
    changed.mkdir()
    for file in graphs.glob("*"):
        (changed / file.name).write_bytes(file.read_bytes())
    data = bytearray((changed / "prompt_kv.onnx.data").read_bytes())
    data[0] ^= 1
    (changed / "prompt_kv.onnx.data").write_bytes(data)
    assert build(changed, tmp_path, [PROMPT_KV], optimization_level=2) == {PROMPT_KV: False}


def test_folders_that_do_not_fit_are_refused(graphs: Path, tmp_path: Path) -> None:
    build(graphs, tmp_path, [PROMPT_KV])
    with pytest.raises(ValueError, match="got tensorrt engines, expected graphs"):
        build(tmp_path, tmp_path / "again")
    with pytest.raises(ValueError, match=r"got no graphs \['dots'\] in it, expected some of \['dit'"):
        build(graphs, tmp_path, ["dots"])
    manifest = Manifest.read(tmp_path)
    dataclasses.replace(manifest, variant="infinity").write(tmp_path)
    with pytest.raises(ValueError, match="variant 'infinity' instead of 'base'"):
        build(graphs, tmp_path, [PROMPT_KV])


def test_engines_of_another_version_are_refused(graphs: Path, tmp_path: Path) -> None:
    build(graphs, tmp_path, [PROMPT_KV, DIT])
    manifest = Manifest.read(tmp_path)
    for file in manifest.graphs.values():
        file.built["tensorrt"] = "1.6.0"
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match=r"tensorrt '1.6.0', here '1\.\d.*Build it here: python -m export.to_tensorrt"):
        load_graphs(DIT, Manifest.read(tmp_path), "cpu")


def test_a_process_has_one_tensorrt() -> None:
    tensorrt_library.use(RTX)
    with pytest.raises(ValueError, match="got tensorrt, but this process already uses tensorrt_rtx"):
        tensorrt_library.use(tensorrt_library.TENSORRT)


def test_a_library_that_is_not_there_says_where_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(ValueError, match=r"tensorrt_rtx is not installed .*get it from `pip install tensorrt-rtx-cu13"):
        tensorrt_library.use(RTX)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_tensorrt_itself_needs_a_gpu() -> None:
    from longlive_serve.backends.exported.tensorrt_session import get_target

    with pytest.raises(ValueError, match="got no GPU"):
        get_target(torch.device("cuda"), tensorrt_library.TENSORRT)


def test_the_command_prints_what_it_built(
    graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.to_tensorrt import main

    command = ["to_tensorrt", str(graphs), "--library", RTX, "--out", str(tmp_path), "--only", PROMPT_KV]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    assert PROMPT_KV in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*command, "dots"])
    assert main() == 2
    assert "to_tensorrt: " in capsys.readouterr().err
