# SPDX-License-Identifier: Apache-2.0
"""The fused DiT, in Triton's interpreter: the reference's latents, by CUDA graphs as well, and FP8."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.engines.baseline.dit import EagerDiT
from longlive_serve.backends.fused.cuda_graph_runner import CudaGraphs
from longlive_serve.backends.fused.dit import FusedDiT
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.torch_backend import TorchDiT
from longlive_serve.config.presets import DIT, PRESETS
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.models.dit.causal_dit import CausalDiT
from longlive_serve.models.dit.kv_cache import KVCache, Window
from longlive_serve.models.quantization.int8_fp8_layers import install, scale_for, to_8_bit
from longlive_serve.replay import ReplayCase, case_model, exact_latents, load_case_tensors, replay
from longlive_serve.weights.loader import load_model
from quantization.dynamic_fp8 import simulate, simulate_attention
from tests.fakes.graphs_on_cpu import Graph, graphs_on_cpu
from tests.longlive_serve.test_replay import error_of, run_replay
from tests.support.cases import shorten, write_case
from tests.support.tolerance import Float64, assert_as_near, assert_reference, error

pytestmark = pytest.mark.numeric
TINY = PRESETS["tiny"]
WINDOW = Window(TINY.window)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


def tiny_model() -> CausalDiT:
    model: CausalDiT = load_model(DIT, TINY, "random", "cpu", torch.float32)
    return model


def both(fp8: bool = False, fp8_attention: bool = False, variant: str = "base") -> tuple[TorchDiT, FusedDiT]:
    fused = FusedDiT(tiny_model(), TINY, 1, variant, fp8, fp8_attention)
    return TorchDiT(tiny_model(), TINY, 1, variant), fused


def latents(seed: int) -> Tensor:
    shape = (1, 3, TINY.dit.channels, TINY.latent_height, TINY.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(rows: int) -> Tensor:
    embeds = torch.randn(1, TINY.dit.text_len, TINY.dit.text_dim, generator=torch.Generator().manual_seed(0))
    embeds[:, rows:] = 0
    return embeds


@pytest.mark.parametrize("name", ["dit_tiny_rollout", "dit_tiny_switch_mid_sinkF", "dit_tiny_infinity_switch"])
def test_it_makes_the_latents_of_the_reference(name: str, tmp_path: Path) -> None:
    path = write_case(tmp_path, name)
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    with graphs_on_cpu():
        dit = FusedDiT(case_model(case, tensors), case.model_config, 1, case.variant, fp8=False)
        got = replay(case, tensors, dit)
    assert_reference(got, tensors["latents"], exact_latents(case, tensors))
    assert Graph.replayed > Graph.captured > 2


def test_replay_runs_it(tmp_path: Path) -> None:
    path = write_case(tmp_path, "dit_tiny_switch_early_sinkT")
    done = run_replay(path, "--backend", "fused")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("options", [["--fp8"], ["--fp8-attention"]])
def test_replay_runs_it_in_fp8(options: list[str], tmp_path: Path) -> None:
    """Two chunks, which is enough to see that it is another precision, and that it is near."""
    path = write_case(tmp_path, "dit_tiny_rollout")
    shorten(path, 2)
    done = run_replay(path, "--backend", "fused", *options, "--tolerance", "0.5")
    assert done.returncode == 0, done.stdout + done.stderr
    assert error_of(done.stdout) > 1e-3


def test_in_bfloat16_it_is_as_near_the_reference_as_the_eager_baseline(tmp_path: Path) -> None:
    path = write_case(tmp_path, "dit_tiny_rollout")
    case = ReplayCase.load(path)
    tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
    distances = []
    for fused in (False, True):
        model = case_model(case, tensors).bfloat16()
        dit = FusedDiT(model, case.model_config, 1, "base", False) if fused else EagerDiT(model, case.model_config, 1)
        distances.append((replay(case, tensors, dit) - tensors["latents"]).norm().item())
    # The norms of as many roundings, but others, are within some percent of each other; that of twice as many would be
    # 1.4 times as large.
    assert distances[1] < 1.2 * distances[0]


@pytest.mark.parametrize("used", [5, 127, 128])
def test_a_prompt_without_most_of_its_padding_says_the_same(used: int) -> None:
    sizes = dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, text_len=192))
    model = CausalDiT(sizes.dit).eval()
    plain = TorchDiT(copy.deepcopy(model), sizes, 1, "base")
    exact = TorchDiT(copy.deepcopy(model).double(), sizes, 1, "base")
    fused = FusedDiT(model, sizes, 1, "base", fp8=False)
    embeds = torch.nn.functional.pad(text(64).repeat(1, 2, 1)[:, :used], (0, 0, 0, 192 - used))
    rows = fused.embed_prompt(embeds, used)
    assert rows[0].shape[3] == (128 if used < 128 else 192)

    def flow(dit: TorchDiT | FusedDiT) -> Tensor:
        return dit.denoise(latents(1), 0, dit.embed_prompt(embeds, used), 0, WINDOW.step(0))

    with Float64():
        expected = flow(exact)
    assert_as_near(flow(fused), flow(plain), expected)


def second_chunk(*dits: TorchDiT | FusedDiT) -> list[Tensor]:
    """Its flow at the second step, after a first chunk that was committed."""
    for dit in dits:
        dit.update_kv_cache(latents(1), dit.embed_prompt(text(9), 9), 0, WINDOW.step(0))
    return [dit.denoise(latents(2), 1, dit.embed_prompt(text(9), 9), 0, WINDOW.step(1)) for dit in dits]


@pytest.mark.parametrize("variant", ["base", "infinity"])
@pytest.mark.parametrize("fp8_attention", [False, True])
def test_fp8_is_close_and_keeps_the_cache_close(fp8_attention: bool, variant: str) -> None:
    plain, fused = both(True, fp8_attention, variant)
    flows = second_chunk(plain, fused)
    assert 1e-4 < error(flows[1], flows[0]) < 0.1
    keys = fused.cache.keys.float()
    if fused.model.fp8_attention is not None:
        keys *= fused.model.fp8_attention.scales[:, 1, None, None, None, None]
    assert 1e-4 < error(keys, plain.cache.keys) < 0.1


@pytest.mark.parametrize("fp8_attention", [False, True])
def test_fp8_is_what_the_evaluation_simulates(fp8_attention: bool) -> None:
    plain, fused = both(True, fp8_attention)
    prepare = simulate_attention if fp8_attention else simulate
    prepare(SimpleNamespace(backends=SimpleNamespace(dit=plain)))  # type: ignore[arg-type]
    simulated, flow, expected = second_chunk(plain, fused, both()[0])
    # A number near the middle of two of FP8's may be rounded to either. Each of N numbers' roundings does about
    # 1 / sqrt(N) of all that rounding does: one in 25 would have to be that near, and one in 10 000 is.
    assert (simulated - flow).norm() < (flow - expected).norm() / 5


def test_a_slot_with_fp8_attention_is_a_quarter_of_one_in_float32() -> None:
    plain, fused = both(True, True)
    assert plain.cache.keys.nbytes == 4 * fused.cache.keys.nbytes
    assert KVCache.bytes_of(TINY, 1, fused.cache_dtype) == fused.cache.keys.nbytes + fused.cache.values.nbytes


def test_fp8_attention_by_graphs_is_the_same() -> None:
    flows = []
    for graphs in (False, True):
        with graphs_on_cpu() if graphs else contextlib.nullcontext():
            fused = both(True, True)[1]
            prompt = fused.embed_prompt(text(9), 9)
            for chunk in range(3):  # the first of a size runs as it is, the next one is captured
                fused.update_kv_cache(latents(chunk), prompt, 0, WINDOW.step(chunk))
            flows.append([fused.denoise(latents(4), step, prompt, 0, WINDOW.step(3)) for step in range(4)])
    assert all(plain.equal(replayed) for plain, replayed in zip(*flows, strict=True))


def test_what_cannot_be_fused_is_refused() -> None:
    model = tiny_model()
    weight = model.get_parameter("blocks.0.ffn.0.weight")
    scale = scale_for(weight.abs().amax(1), torch.int8)
    install(
        model,
        {"blocks.0.ffn.0": {"quantized_weight": to_8_bit(weight, scale[:, None], torch.int8), "weight_scale": scale}},
    )
    with pytest.raises(ValueError, match="quantized weights"):
        FusedDiT(model, TINY, 1, "base", fp8=False)
    sizes = dataclasses.replace(TINY.dit, ffn_dim=120)
    with pytest.raises(ValueError, match="ffn_dim 120, expected multiples of 16"):
        FusedDiT(CausalDiT(sizes), dataclasses.replace(TINY, dit=sizes), 1, "base", fp8=True)
    with pytest.raises(ValueError, match="fp8: got true with backend torch, expected fused"):
        ServeConfig(backend="torch", fp8=True)
    with pytest.raises(ValueError, match="fp8_attention: got true without fp8"):
        ServeConfig(backend="fused", fp8_attention=True)


def test_the_engine_fused_is_built_of_what_can_be_fused() -> None:
    backends = build_backends(ServeConfig(preset="tiny", backend="fused", device="cpu", fp8=True))
    assert backends.name == "fused+torch"  # the text encoder is torch's
    assert type(backends.dit).__name__ == "FusedDiT"
    assert type(backends.vae_decoder).__name__ == "FusedVAEDecoder"
    assert backends.dit.cache_dtype == torch.float32
    small = build_backends(ServeConfig(preset="tiny", backend="fused", device="cpu", fp8=True, fp8_attention=True))
    assert small.dit.cache_dtype == torch.float8_e4m3fn


def test_without_the_compiler_it_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"backend: got fused, but Triton, .* is not installed"):
        build_backends(ServeConfig(preset="tiny", backend="fused", device="cpu"))


def test_a_graph_runs_on_what_it_is_given_and_copies_what_lasts_once() -> None:
    copies = []

    class Counting(CudaGraphs):
        def _copy_input(self, number: int, tensor: Tensor, is_persistent: bool) -> Tensor:
            before = self._last_inputs.get((number, tensor.shape))
            copies.append((number, not is_persistent or before is not tensor))
            return super()._copy_input(number, tensor, is_persistent)

    with graphs_on_cpu():
        graphs = Counting(torch.device("cpu"))
        weight, other = torch.ones(3), torch.full((3,), 5.0)
        results = []
        for turn in range(5):
            x = torch.full((3,), float(turn))
            results.append(
                graphs(
                    "sum",
                    turn == 4,
                    lambda given: given[0] + given[1],
                    [x, weight if turn < 3 else other],
                    num_persistent=1,
                )
            )
    assert [result.tolist()[0] for result in results if result is not None] == [1, 2, 3, 8, 9]
    assert [copied for number, copied in copies if number == 1] == [True, False, False, True, False]
    assert (Graph.captured, Graph.replayed) == (2, 4)  # two slots


def test_every_thread_runs_a_function_as_it_is_before_it_captures() -> None:
    """Libraries make handles and choose kernels for each thread, which a capture does not allow."""
    captured = []
    with graphs_on_cpu():
        graphs = CudaGraphs(torch.device("cpu"))

        def use(place: int) -> None:
            graphs("twice", place, lambda given: given[0] * 2, [torch.ones(2)])
            captured.append(Graph.captured)

        for places in ((0, 0), (1, 1), (0,)):
            with ThreadPoolExecutor(1) as thread:
                for place in places:
                    thread.submit(use, place).result()
    assert captured == [0, 1, 1, 2, 2]  # what has been captured is there for all


def test_what_one_slot_has_warmed_up_is_captured_for_all() -> None:
    prompts = [text(9), text(9)]
    with graphs_on_cpu():
        fused = FusedDiT(tiny_model(), TINY, 3, "base")
        for chunk in range(6):  # until the ring has been round once
            second_of(fused, 0, chunk, prompts[0])
        fused.prepare(1)
        of_one = Graph.captured
        fused.prepare(2)
        captured = Graph.captured
        assert captured == 2 * of_one
        flows = [second_of(fused, 1, chunk, prompts[1]) for chunk in range(6)]
        assert Graph.captured == captured
        fused.prepare()
        assert Graph.captured == 3 * of_one
    plain, exact = (TorchDiT(model, TINY, 1, "base") for model in (tiny_model(), tiny_model().double()))
    for chunk, flow in enumerate(flows):
        with Float64():
            expected = second_of(exact, 0, chunk, prompts[0])
        assert_as_near(flow, second_of(plain, 0, chunk, prompts[0]), expected)


def test_after_the_warm_up_no_session_waits_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it switches its prompt, in a slot that nobody has used. One layer is captured as any other."""
    monkeypatch.setitem(PRESETS, "tiny", dataclasses.replace(TINY, dit=dataclasses.replace(TINY.dit, num_layers=1)))
    with graphs_on_cpu():
        config = ServeConfig(preset="tiny", backend="fused", decoder="tiny", device="cpu", slots=2)
        runner = ModelRunner(build_backends(config), config.model_config)
        runner.warm_up()
        captured = Graph.captured
        for switch, early in ((1, True), (3, False), (6, True)):
            session = Session(id="a", prompt=Prompt(index=0, text="a"), noise=SeededNoise(0), slot=1)
            for chunk in range(7):
                if chunk == switch:
                    session.add_prompt("b", NOW)
                list(runner.collect_output(runner.execute_model_async(session, early)))
        assert Graph.captured == captured


def second_of(dit: TorchDiT | FusedDiT, slot: int, chunk: int, prompt: Tensor) -> Tensor:
    """The flow of a chunk at the second step; then it is committed."""
    prompt_kv, plan = dit.embed_prompt(prompt, 9), WINDOW.step(chunk)
    flow = dit.denoise(latents(chunk), 1, prompt_kv, slot, plan)
    dit.update_kv_cache(latents(chunk + 10), prompt_kv, slot, plan)
    return flow


def test_a_function_that_waits_for_the_device_cannot_be_captured() -> None:
    with graphs_on_cpu():
        graphs = CudaGraphs(torch.device("cpu"))
        graphs("waits", 0, lambda given: given[0] * float(given[0].sum()), [torch.ones(2)])
        with pytest.raises(RuntimeError, match="synchronizes during a graph capture"):
            graphs("waits", 0, lambda given: given[0] * float(given[0].sum()), [torch.ones(2)])
