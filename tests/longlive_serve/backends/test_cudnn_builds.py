# SPDX-License-Identifier: Apache-2.0
"""cuDNN's plans: built many at a time, kept on disk, and not trusted where they are torn or cannot be loaded."""

from __future__ import annotations

import logging
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from longlive_serve.backends.fused import cudnn_builds
from longlive_serve.backends.fused.cudnn_attention import CudnnAttention
from longlive_serve.backends.fused.cudnn_graphs import NoPlanError
from longlive_serve.backends.fused.cudnn_plan_cache import PlanCache
from tests.fakes import cudnn_on_cpu as stand_in
from tests.fakes.cudnn_on_cpu import Graph, cudnn_on_cpu
from tests.longlive_serve.backends.test_cudnn_attention import inputs

__all__ = ["cudnn_on_cpu"]

CPU = torch.device("cpu")
ALL = ["eng2_k24=17", "eng7_k24=0", "eng2_k24=23", "eng2_k24=46", "eng2_k24=47"]
"""That compile."""
FASTEST = "eng2_k24=23"
SIZES = (70, 41, 33)


class TestCache:
    def test_an_entry_is_there_for_its_key_alone(self, tmp_path: Path) -> None:
        cache = PlanCache(tmp_path / "a/b")
        assert cache.get("key") is None
        cache.put("key", b"a plan")
        cache.put("other", b"")
        assert (cache.get("key"), cache.get("other"), cache.get("ke")) == (b"a plan", b"", None)
        cache.put("key", b"another")
        assert PlanCache(tmp_path / "a/b").get("key") == b"another"
        assert len(list((tmp_path / "a/b").iterdir())) == 2, "nothing else is left there"

    @pytest.mark.parametrize("torn", [b"", b"x", b"x" * 40])
    def test_a_file_that_is_torn_or_anothers_is_none(
        self, tmp_path: Path, torn: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = PlanCache(tmp_path)
        cache.put("key", b"a plan")
        cache.put("other", b"a plan")
        mine, others = cache._path("key"), cache._path("other")
        whole = mine.read_bytes()
        for content in (torn, whole[:-1], whole[:-1] + b"x", others.read_bytes()):
            mine.write_bytes(content)
            assert cache.get("key") is None
            assert f"{mine} is damaged" in caplog.text
            caplog.clear()
        cache.put("key", b"a plan")
        assert mine.read_bytes() == whole

    def test_a_folder_that_cannot_be_written_holds_none(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO)
        cache = PlanCache(Path("/dev/null/cache"))
        cache.put("key", b"a plan")
        assert cache.get("key") is None
        assert "the next start builds it again" in caplog.text

    def test_a_write_that_fails_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*paths: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(os, "replace", full)
        PlanCache(tmp_path).put("key", b"a plan")
        assert not list(tmp_path.iterdir())


def attend_at(attend: CudnnAttention, sizes: tuple[int, ...] = SIZES) -> list[Tensor]:
    return [attend(*inputs(33, keys)) for keys in sizes]


@pytest.mark.usefixtures("cudnn_on_cpu")
class TestPlans:
    def test_those_of_all_sizes_are_built_before_anybody_waits_for_one(self) -> None:
        attend = CudnnAttention(CPU)
        with attend.record_calls():
            noted = attend_at(attend)
        assert Graph.built == [*ALL, *[FASTEST] * 3]
        assert all(out.float().std() > 0.5 for out in noted[1:]), "what follows in a model has numbers to work on"
        got = attend_at(attend)
        assert len(Graph.built) == len(ALL) + 3
        assert all(torch.equal(one, other) for one, other in zip(got, attend_at(CudnnAttention(CPU)), strict=True))

    def test_the_next_start_builds_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = attend_at(CudnnAttention(CPU))
        Graph.built.clear()
        assert all(torch.equal(*pair) for pair in zip(attend_at(CudnnAttention(CPU)), first, strict=True))
        assert Graph.built == []
        attend_at(CudnnAttention(CPU), (70, 29))
        assert Graph.built == [FASTEST], "another size, of a family whose kernel is known"

    @pytest.mark.parametrize("what", ["GPU", "cuDNN", "frontend", "torch"])
    def test_another_machine_or_version_builds_its_own(self, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
        attend_at(CudnnAttention(CPU))
        Graph.built.clear()
        frontend: Any = sys.modules["cudnn"]
        if what == "GPU":
            monkeypatch.setattr(stand_in, "PROPERTIES", '{"deviceName": "another"}')
        elif what == "cuDNN":
            monkeypatch.setattr(frontend, "backend_version", lambda: 92000)
        elif what == "frontend":
            monkeypatch.setattr(frontend, "__version__", "2.0.0")
        else:
            monkeypatch.setattr(cudnn_builds, "torch", SimpleNamespace(__version__="3.0"))
        attend_at(CudnnAttention(CPU))
        assert Graph.built == [*ALL, *[FASTEST] * 3]

    def test_a_damaged_entry_is_built_again(self, tmp_path: Path) -> None:
        first = attend_at(CudnnAttention(CPU))
        for number, file in enumerate(sorted((tmp_path / "cache/longlive-serve/cudnn").iterdir())):
            file.write_bytes(file.read_bytes()[: number % 50])
        Graph.built.clear()
        assert all(torch.equal(*pair) for pair in zip(attend_at(CudnnAttention(CPU)), first, strict=True))
        assert Graph.built == [*ALL, *[FASTEST] * 3]

    def test_plans_that_cannot_be_loaded_are_built_here(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = attend_at(CudnnAttention(CPU))
        monkeypatch.setattr(Graph, "readable", False)
        Graph.built.clear()
        assert all(torch.equal(*pair) for pair in zip(attend_at(CudnnAttention(CPU)), first, strict=True))
        assert Graph.built == [FASTEST] * 3
        assert caplog.text.count("cannot load prebuilt plans (another driver): building them one by one") == 1

    def test_processes_that_die_leave_the_work_to_this_one(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Dying(stand_in.Pool):
            def map(self, *arguments: Any) -> list[Any]:
                raise BrokenProcessPool("a process was killed")

        monkeypatch.setattr(cudnn_builds, "ProcessPoolExecutor", Dying)
        attend_at(CudnnAttention(CPU))
        assert Graph.built == [*ALL, *[FASTEST] * 3]
        assert "one by one in this process, as worker processes failed: a process was killed" in caplog.text

    def test_what_cudnn_cannot_do_is_said_at_the_end_of_noting(self) -> None:
        attend = CudnnAttention(CPU)
        with pytest.raises(NoPlanError, match="head size"), attend.record_calls():
            attend(*inputs(33, 70, size=24))
        attend_at(attend, (70,))
