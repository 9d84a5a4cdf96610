# SPDX-License-Identifier: Apache-2.0
"""cuDNN's FP8 attention: what it is given, and what is taken where there is none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.engines.hardware import attention_table
from longlive_serve.backends.fused import attention_autotune
from longlive_serve.backends.fused.attention_autotune import example, fp8_kernels, in_fp8, select_fp8_attention
from longlive_serve.backends.fused.cudnn_attention import CudnnAttention
from longlive_serve.config.presets import PRESETS
from longlive_serve.kernels.attention import attention_fp8
from tests.fakes.cudnn_on_cpu import Graph, cudnn_on_cpu
from tests.fakes.triton_on_cpu import random

pytestmark = pytest.mark.numeric

__all__ = ["cudnn_on_cpu"]

TINY = PRESETS["tiny"]
CPU = torch.device("cpu")


def inputs(queries: int, keys: int, heads: int = 3, size: int = 32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries with heads inside, keys and values in a longer cache, and three scales of different sizes."""
    q = random(queries, heads, size).transpose(0, 1)
    cache = [factor * random(heads, keys + 7, size, seed=seed)[:, :keys] for factor, seed in ((3.0, 1), (0.2, 2))]
    q8, k8, v8, scales = in_fp8(q[None], *(x[None] for x in cache))
    room = torch.zeros(2, heads, keys + 7, size, dtype=q8.dtype)
    room[0, :, :keys], room[1, :, :keys] = k8, v8
    return q8, room[0, :, :keys], room[1, :, :keys], scales


@pytest.mark.usefixtures("cudnn_on_cpu")
def test_it_is_given_what_our_own_kernel_is_given() -> None:
    attend = CudnnAttention(CPU)
    for queries, keys in ((33, 70), (33, 41)):
        tensors = inputs(queries, keys)
        got = attend(*tensors)
        assert got.dtype == torch.float8_e4m3fn
        assert got.is_contiguous()
        # Their weights are rounded at other places, which is lost in the sum; so each may be rounded to another
        # number of FP8: twice a number that is anywhere within 2^-4 of the exact one.
        ours = attention_fp8(*tensors).float()
        assert (got.float() - ours).norm() < 2**0.5 * 2**-4 / 3**0.5 * ours.norm()


@pytest.mark.usefixtures("cudnn_on_cpu")
def test_all_kernels_are_compiled_and_measured_at_the_first_size_and_one_at_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    attend = CudnnAttention(CPU)
    for keys in (70, 41, 70, 41):
        attend(*inputs(33, keys))
    fastest = "eng2_k24=23"
    assert Graph.built == [
        *("eng2_k24=17", "eng7_k24=0", fastest, "eng2_k24=46", "eng2_k24=47"),
        *(fastest, fastest),  # at the two sizes
    ]
    assert f"cuDNN, attention in FP8: {fastest} of 4 kernels ({fastest} " in caplog.text
    assert "cuDNN, attention in FP8: eng2_k24=47 is wrong: error 1 relative to eng2_k24=17" in caplog.text
    with pytest.raises(RuntimeError, match="cuDNN does not support this here: head size"):
        attend(*inputs(33, 70, size=24))


@pytest.mark.parametrize("there", [True, False])
def test_the_log_says_which_was_taken_and_why(
    there: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a device that says that it is CUDA."""
    if there:
        request.getfixturevalue("cudnn_on_cpu")
    cudnn: CudnnAttention | ImportError
    try:
        cudnn = CudnnAttention(CPU)
    except ImportError as missing:
        cudnn = missing
    monkeypatch.setattr(attention_autotune, "fp8_kernels", lambda _: {"triton fp8": attention_fp8, "cudnn fp8": cudnn})
    monkeypatch.setattr(attention_autotune, "example", lambda config, _, *rest: example(config, CPU, *rest))
    taken = iter((3e-3, 2e-3))
    monkeypatch.setattr(attention_autotune, "median_seconds", lambda call, *_: next(taken))
    caplog.set_level(logging.INFO)
    attend = select_fp8_attention(TINY, SimpleNamespace(type="cuda"))  # type: ignore[arg-type]
    if there:
        assert isinstance(attend, CudnnAttention)
        assert "attention in FP8: cudnn fp8 (triton fp8 3.00 ms, cudnn fp8 2.00 ms)" in caplog.text
    else:
        assert attend is attention_fp8
        assert "attention in FP8: cudnn fp8 is not available: No module named 'cudnn'" in caplog.text
        assert "attention in FP8: triton fp8 (triton fp8 3.00 ms)" in caplog.text


def test_without_a_gpu_our_own_kernel_is_taken() -> None:
    assert select_fp8_attention(TINY, CPU) is attention_fp8
    assert fp8_kernels(CPU).keys() == {"triton fp8"}


def test_the_benchmark_shows_what_fp8_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = attention_table._calls_in_fp8(*example(TINY, CPU, torch.float32))
    call, wide = calls["triton fp8"]
    expected = attention_table.exact(*example(TINY, CPU, torch.float32))
    assert 0.005 < (wide(call()) - expected).norm() / expected.norm() < 0.1
    missing = ImportError("no cudnn here")
    monkeypatch.setattr(attention_table, "fp8_kernels", lambda _: {"cudnn fp8": missing})
    call, _ = attention_table._calls_in_fp8(*example(TINY, CPU, torch.float32))["cudnn fp8"]
    with pytest.raises(ImportError, match="no cudnn here"):
        call()
