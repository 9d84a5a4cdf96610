# SPDX-License-Identifier: Apache-2.0
"""Checks the fused backend on a GPU, and measures the parts of a chunk, within a few minutes:
`python3 -m tests.project.gpu_check --json gpu_check.json`.

Needs only torch, Triton, transformers, safetensors, NumPy and rich; the project need not be installed. The file is
written after every step. A failed step records its reason; a step that hangs ends the run at the deadline. `--toy` runs
the same steps at toy size on the CPU, with TRITON_INTERPRET=1, to test this script. FP8 on the CPU needs PyTorch 2.13.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.engines.check import CHUNKS, check, make_video
from benchmarks.engines.models import RandomModelLoader
from benchmarks.engines.record import hardware, torch_versions
from benchmarks.engines.rows import ROWS, with_words
from benchmarks.results import Measurement
from longlive_serve.backends.device import use_device
from longlive_serve.backends.fused.cudnn_library import relative_error
from longlive_serve.backends.fused.dit import FusedDiT
from longlive_serve.backends.registry import build_backends
from longlive_serve.backends.start_up import measure_start
from longlive_serve.config.presets import PRESETS, TINY, WAN
from longlive_serve.config.serve_config import FUSED, TORCH, ServeConfig
from longlive_serve.engine.model_runner import ModelRunner
from longlive_serve.engine.session import Prompt, SeededNoise, Session
from longlive_serve.replay import ReplayCase, case_model, load_case_tensors, replay
from tests.benchmarks import chunk_parts
from tests.benchmarks.chunk_parts import Machine
from tests.support.cases import ROLLOUTS, shorten, write_case

SECTION = "tests.project.gpu_check"
CODE = ("longlive_serve", "tests/project/gpu_check.py")
PRECISIONS = {"float32": 0.01, "bfloat16": 0.05, "fp8": 0.3, "fp8 attention": 0.3}
"""Maximum relative error (L2) of a golden rollout's latents: several times that of the interpreter. Wrong results have
errors above 1."""
OUT_OF_TIME = 3


class StepError(RuntimeError):
    """A failed check; the report still includes `found`."""

    def __init__(self, message: str, found: Any) -> None:
        super().__init__(message)
        self.found = found


def _is_less(off: float | str, most: float) -> bool:
    return isinstance(off, float) and off < most


class Checks:
    """The steps of the check."""

    def __init__(self, toy: bool) -> None:
        self.toy, self.device = toy, "cpu" if toy else "cuda"
        config = PRESETS["tiny" if toy else "longlive-1.3b"]
        dtype = torch.float32 if toy else torch.bfloat16
        self.machine = Machine(config=config, device=self.device, dtype=dtype, runs=2 if toy else 20)
        use_device("cuda:0" if self.device == "cuda" else self.device)

    def steps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """All steps, the most important first."""
        yield "golden rollouts", self.rollouts
        for row in ("fused", "fused fp8 attention tiny", "fused all fp8"):
            yield f"full size: {row}", functools.partial(self.full_size, row)
        yield "attention", lambda: chunk_parts.attention(self.machine)
        yield "products", lambda: chunk_parts.products(self.machine)
        yield "kernels of rows", lambda: chunk_parts.rows(self.machine)
        yield "convolutions", lambda: chunk_parts.convolutions(self.machine)
        yield "a chunk's kernels", self.profile

    def rollouts(self) -> dict[str, float | str]:
        """Relative errors of the fused backend on the golden rollouts, with CUDA graphs on a GPU; or the reason of the
        failure."""
        found: dict[str, float | str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name in list(ROLLOUTS)[: 1 if self.toy else 5]:
                path = write_case(Path(folder), name)
                if self.toy:
                    shorten(path, 2)
                case = ReplayCase.load(path)
                tensors = load_case_tensors(case, path.with_suffix(".safetensors"))
                for precision in PRECISIONS:
                    try:
                        off: float | str = self.rollout(case, tensors, precision)
                    except Exception as error:  # go on with the others
                        off = f"{type(error).__name__}: {error}".splitlines()[0]
                    found[f"{name}, {precision}"] = off
        wrong = [name for name, off in found.items() if not _is_less(off, PRECISIONS[name.split(", ")[1]])]
        if wrong:
            raise StepError(f"{', '.join(wrong)}: {found[wrong[0]]}", found)
        return found

    def rollout(self, case: ReplayCase, tensors: dict[str, Tensor], precision: str) -> float:
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        model = case_model(case, tensors).to(self.device, dtype)
        fp8 = precision.startswith("fp8"), precision == "fp8 attention"
        dit = FusedDiT(model, case.model_config, 1, case.variant, *fp8)
        return relative_error(replay(case, tensors, dit, self.device), tensors["latents"])

    def runner(self, **settings: Any) -> ModelRunner:
        config = ServeConfig(preset=self.machine.config.name, device=self.device, slots=2, **settings)
        backends = with_words(build_backends(config, RandomModelLoader.from_config(config)), config)
        return ModelRunner(backends, config.model_config, config.variant)

    def full_size(self, row: str) -> dict[str, Any]:
        """Compare a video with a prompt switch with the torch backend; also the time to build the backend, by phase."""
        settings = dict(next(one.settings for one in ROWS if one.name == row))
        if self.toy:
            settings.pop("fp8_decoder", None)  # needs cuDNN
        expected = make_video(
            self.runner(backend=TORCH, decoder=settings.get("decoder", WAN)), 3 if self.toy else CHUNKS
        )
        torch.cuda.empty_cache()
        with measure_start() as start_s:
            runner = self.runner(**settings)
        return {"start_s": start_s, **check(runner, expected)}

    def profile(self) -> dict[str, Any]:
        """Profile a chunk in the middle of a video."""
        runner = self.runner(backend=FUSED, decoder=TINY)
        prompt = Prompt(index=0, text="a red fox")
        session = Session(id="profile", prompt=prompt, noise=SeededNoise(0), slot=0)
        for _ in range(2 if self.toy else 6):
            runner.advance(session)
        return chunk_parts.profile(lambda: runner.advance(session), self.device)


class Report:
    """The results, written to a file after every step."""

    def __init__(self, path: Path, argv: Sequence[str] | None) -> None:
        self._path, self._began = path, time.monotonic()
        self._measurement = Measurement.begin(SECTION, argv)
        self._hardware = hardware("cuda") if torch.cuda.is_available() else ""
        self.record: dict[str, Any] = {"complete": False, "steps": {}}
        self._lock = threading.Lock()

    @property
    def failed(self) -> list[str]:
        return [name for name, step in self.record["steps"].items() if "failed" in step]

    def add(self, name: str, seconds: float, **facts: Any) -> None:
        with self._lock:
            self.record["steps"][name] = {"seconds": seconds, **facts}
        self.save()
        failed = str(facts.get("failed", "")).strip().splitlines()
        print(f"{name}: {seconds:.1f} s{': ' + failed[-1] if failed else ''}", flush=True)

    def save(self) -> None:
        with self._lock:
            self.record["seconds"] = time.monotonic() - self._began
            self._measurement.write(
                self._path, self.record, code=CODE, hardware=self._hardware, versions=torch_versions()
            )


def out_of_time(report: Report, limit: float) -> threading.Timer:
    """Start a timer that exits the process after `limit` seconds."""

    def end() -> None:
        report.save()
        print(f"gpu_check: stopped after {limit:g} s; the results so far are saved", file=sys.stderr, flush=True)
        os._exit(OUT_OF_TIME)

    timer = threading.Timer(limit, end)
    timer.daemon = True
    timer.start()
    return timer


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 when a step failed, 2 without a GPU, 3 at the deadline."""
    parser = argparse.ArgumentParser(
        prog=f"python3 -m {SECTION}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="write the results to this file, after every step")
    parser.add_argument("--seconds", type=float, default=180.0, metavar="S", help="deadline (default: %(default)g)")
    parser.add_argument("--toy", action="store_true", help="at toy size on the CPU (with TRITON_INTERPRET=1)")
    arguments = parser.parse_args(argv)
    if not arguments.toy and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU; --toy runs the steps on the CPU", file=sys.stderr)
        return 2
    report = Report(arguments.json, argv)
    timer = out_of_time(report, arguments.seconds)
    for name, step in Checks(arguments.toy).steps():
        began = time.monotonic()
        try:
            with torch.inference_mode():
                found = step()
        except StepError as error:
            report.add(name, time.monotonic() - began, failed=str(error), found=error.found)
        except Exception:
            report.add(name, time.monotonic() - began, failed=traceback.format_exc())
        else:
            report.add(name, time.monotonic() - began, found=found)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    timer.cancel()
    report.record["complete"] = True
    report.save()
    return int(bool(report.failed))


if __name__ == "__main__":
    sys.exit(main())
