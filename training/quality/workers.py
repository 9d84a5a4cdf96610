# SPDX-License-Identifier: Apache-2.0
"""Generates videos with the server's model runner in one process per core, for the quality measure.

A task is a function of a model runner and a case. Tasks must be module-level functions to be pickled.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from torch import Tensor

from longlive_serve.backends.registry import build_backends
from longlive_serve.config.serve_config import ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import NOW, Prompt, SeededNoise, Session
from longlive_serve.protocol.session_options import RECACHE

Case = TypeVar("Case")
Result = TypeVar("Result")

PRELOADED = [__name__, "transformers.models.umt5.modeling_umt5"]
"""Slow imports of the workers, done once in the fork server."""

_runners: list[ModelRunner] = []  # the worker process's model runner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Script:
    """A video to generate: prompts by their first chunk."""

    prompts: dict[int, str]
    """Must contain chunk 0."""
    seed: int
    on_switch: str = RECACHE


def build_model_runner(folder: Path) -> ModelRunner:
    config = ServeConfig(preset="demo", weights=str(folder), device="cpu")
    return ModelRunner(build_backends(config), config.model_config, config.variant)


def video(runner: ModelRunner, script: Script, chunks: int) -> list[Tensor]:
    """The frames of every chunk, uint8 [9 or 12, height, width, 3]."""
    first = Prompt(index=0, text=script.prompts[0])
    session = Session(id="quality", prompt=first, noise=SeededNoise(script.seed), slot=0, on_switch=script.on_switch)
    made = []
    for chunk in range(chunks):
        if chunk and chunk in script.prompts:
            session.add_prompt(script.prompts[chunk], NOW)
        made.append(torch.from_numpy(runner.advance(session).frames))
    return made


class Workers:
    """A context manager of worker processes, each with the models in `folder` and one thread.

    `prepare`, a module-level function, may change each model runner before its first video.
    """

    def __init__(self, folder: Path, prepare: Callable[[ModelRunner], None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pool = ProcessPoolExecutor(os.cpu_count(), context, _begin, (folder, prepare))

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def map(self, title: str, task: Callable[[ModelRunner, Case], Result], cases: Sequence[Case]) -> list[Result]:
        """The task's results for all cases, in order; shows a progress bar."""
        futures = [self._pool.submit(_run, task, case) for case in cases]
        with Progress() as progress:
            for _ in progress.track(as_completed(futures), total=len(cases), description=title):
                pass
        return [future.result() for future in futures]


def _begin(folder: Path, prepare: Callable[[ModelRunner], None] | None) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    runner = build_model_runner(folder)
    if prepare is not None:
        prepare(runner)
    _runners.append(runner)


def _exit_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(task: Callable[[ModelRunner, Any], Result], case: Any) -> Result:
    return task(_runners[0], case)
