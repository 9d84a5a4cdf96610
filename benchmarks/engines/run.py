# SPDX-License-Identifier: Apache-2.0
"""Measures one row after the other and frees its memory before the next.

Called by the command line, which shows and writes `Run.record`, also after an interrupted run.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.engines.check import Video, check, make_video
from benchmarks.engines.hardware.attention_table import measure_attention
from benchmarks.engines.hardware.roofline import FP8, achieved, measure_roofline, shares
from benchmarks.engines.live import measure_live
from benchmarks.engines.measure import SLOTS, Plan, SingleSession
from benchmarks.engines.rows import Row, build
from longlive_serve.backends.device import use_device
from longlive_serve.backends.start_up import measure_start
from longlive_serve.config.serve_config import TORCH, ServeConfig
from longlive_serve.engine.model_runner import ModelRunner

log = logging.getLogger(__name__)

OnProgress = Callable[[str, str], None]
"""Called with the current row (or `the device`) and step."""


class Run:
    """One run of the benchmark on one device."""

    def __init__(
        self,
        preset: str,
        device: str,
        rows: Sequence[Row],
        plan: Plan,
        on_progress: OnProgress,
        *,
        flex: bool = True,
        check: bool = False,
    ) -> None:
        """`flex`: include FlexAttention in the attention table. `check`: compare each row's results with torch's."""
        self.preset, self.device, self.rows, self.plan, self.on_progress = preset, device, rows, plan, on_progress
        self.flex, self.check = flex, check
        self._expected: dict[str, Video] = {}
        """By decoder."""
        self.on_cuda = device.startswith("cuda")
        self.dtype = "bfloat16" if self.on_cuda else "float32"  # what `auto` resolves to in a server
        self.record: dict[str, Any] = {
            "preset": preset,
            "device": device,
            "dtype": self.dtype,
            "weights": "random",
            "complete": False,
            "roofline": {},
            "attention": {},
            "rows": [],
            "skipped": {},
            "failed": {},
        }

    def measure(self, save: Callable[[], None]) -> None:
        """Fill `record`. `save` is called after every row, and at the end."""
        config = self._config({})
        use_device(self.device)
        self.on_progress("the device", "matrix products and copies")
        self.record["roofline"] = measure_roofline(self.device, self.dtype)
        self.on_progress("the device", "attention")
        self.record["attention"] = measure_attention(config.model_config, self.device, self.dtype, self.flex)
        for row in self.rows:
            self._measure_or_skip(row)
            self._free()
            save()
        self.record["complete"] = True
        save()

    def _measure_or_skip(self, row: Row) -> None:
        """Record the reason if a row cannot be measured; the run goes on."""
        try:
            self.record["rows"].append(self._measure(row))
        except (ValueError, ImportError) as error:
            self.record["skipped"][row.name] = str(error)
        except Exception as error:  # one failing row does not end the run
            log.exception("%s failed", row.name)
            self.record["failed"][row.name] = f"{type(error).__name__}: {error}"

    def _measure(self, row: Row) -> dict[str, Any]:
        config = self._config(dict(row.settings))
        expected = self._video_of_torch(config.decoder) if self.check else None
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        self.on_progress(row.name, "models")
        with measure_start() as start_s:
            backends = build(row, config)
            runner = ModelRunner(backends, config.model_config, config.variant)
            self.on_progress(row.name, "warm-up")
            chunk_s = runner.warm_up(SLOTS)
        if expected is not None:
            self.on_progress(row.name, "check")
        checked = {} if expected is None else {"check": check(runner, expected)}
        gc.collect()
        gc.freeze()  # as the server does

        def on_step(step: str) -> None:
            self.on_progress(row.name, step)

        results = SingleSession(runner, self.plan, on_step).measure()
        live = measure_live(runner, config, chunk_s, self.plan.live_seconds, self.plan.max_sessions, on_step)
        reached = achieved(results, config.model_config, config.decoder, row.is_baseline)
        return {
            "name": row.name,
            "backend": backends.name,
            "decoder": config.decoder,
            "dtype": backends.dtype,
            "fp8": config.fp8,
            "fp8_attention": config.fp8_attention,
            "fp8_decoder": config.fp8_decoder,
            "baseline": row.is_baseline,
            **results,
            **checked,
            "live": live,
            "ready_s": sum(start_s.values()),
            "start_s": start_s,
            "flops": reached,
            "of_roofline": shares(reached, self.record["roofline"], backends.dtype),
            "of_fp8_roofline": shares(reached, self.record["roofline"], FP8) if config.fp8 else {},
            "peak_bytes": torch.cuda.max_memory_allocated() if self.on_cuda else None,
        }

    def _video_of_torch(self, decoder: str) -> Video:
        if decoder not in self._expected:
            self.on_progress("torch", "reference video")
            config = self._config({"backend": TORCH, "decoder": decoder})
            backends = build(Row(name="expected", settings={}), config)
            self._expected[decoder] = make_video(ModelRunner(backends, config.model_config, config.variant))
            del backends
            self._free()
        return self._expected[decoder]

    def _free(self) -> None:
        gc.unfreeze()
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def _config(self, settings: dict[str, Any]) -> ServeConfig:
        return ServeConfig(preset=self.preset, device=self.device, slots=self.plan.slots, **settings)
