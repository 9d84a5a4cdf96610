# SPDX-License-Identifier: Apache-2.0
"""How the tests run each documented command. A new command needs an entry here."""

from __future__ import annotations

import dataclasses
import shlex

from tests.support.commands import Named

PROMPT = '"A red circle drifts right over a plain black background."'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Smoke:
    """A command to run. Words in braces are files of `test_commands.Prepared` or addresses of the server."""

    command: str
    long: bool = False
    """Takes most of a minute; `-m 'not long'` skips it, CI does not."""

    @property
    def named(self) -> Named:
        return Named(
            where="tests/support/command_table.py", words=("python", "-m", *shlex.split(self.command)), whole=True
        )

    @property
    def needs_server(self) -> bool:
        return "{url}" in self.command or "{metrics}" in self.command


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A command, or options of one, that another test runs."""

    module: str
    options: str = ""
    test: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """A command, or options of one, whose arguments are parsed but which is not run, with the reason."""

    module: str
    options: str = ""
    reason: str


SMOKES = (
    Smoke(command="benchmarks.start_up --config {tiny} --json {out}/startup.json"),
    Smoke(command="longlive_client.cli.set_lora --url {url} --admin-token {token} style.pt=0.8"),
    Smoke(command="benchmarks.serving --url {url} --metrics-url {metrics} --viewers 1,2 --seconds 1"),
    Smoke(command=f"longlive_client.cli.generate --url {{url}} --prompt {PROMPT} --seconds 1"),
    Smoke(
        command="longlive_client.cli.generate --serve --config {tiny} --prompts {root}/examples/story.jsonl "
        "--contact-sheet {out}/story.png"
    ),
    Smoke(command="longlive_client.cli.gif {video} {out}/video.gif"),
    Smoke(command="longlive_client.cli.health --url {url} --ready"),
    Smoke(command="deploy.capacity --price 2.10"),
    Smoke(command="deploy.capacity --page {page}"),
    Smoke(command="deploy.checks --quick --offline"),
    Smoke(command="deploy.drain --url http://{metrics}/metrics --for 1 --settle 0"),
    Smoke(
        command="deploy.autoscaling_simulator --trace flash_crowd --peak-sessions 60 --capacity 2 --cold-start 1 1.5 3 "
        "--sweep refused --json {out}/a.json --plot {out}/a.png"
    ),
    Smoke(
        command="deploy.autoscaling_simulator --policy {root}/deploy/policy.toml --trace flash_crowd --fixed 9 "
        "--peak-sessions 20"
    ),
    Smoke(
        command="export.convert --preset demo --weights {demo} --lora {adapter}=0.8 --dtype float32 --out {out}/demo"
    ),
    Smoke(
        command="benchmarks.engines --device cpu --preset tiny --rows torch --chunks 4 --warmup 0 --live-seconds 0.2 "
        "--max-sessions 1 --json {out}/gpu.json --plot {out}/gpu.png"
    ),
    Smoke(command="longlive_serve.doctor --config {tiny} --grpc-port 0 --http-port 0 --metrics-port 0"),
    Smoke(command="longlive_serve.replay {case} --device cpu --dtype float32 --tolerance 2e-2"),
    Smoke(command="longlive_serve.replay {case} --graphs {case_graphs}"),
    Smoke(
        command='quantization.evaluate --columns "fused fp8" --captions 1 --switches 1 --rollouts 1 '
        "--json {out}/q.json --plot {out}/q.png",
        long=True,
    ),
    Smoke(command="quantization.evaluate --table {root}/results/quantization.json"),
    Smoke(command="quantization.quantize --config {demo_settings} --recipe int8 --prompts {lines} --out {out}/int8"),
    Smoke(
        command="training.quality {demo} --captions 4 --switches 1 --sessions-30s 0 --sessions-240s 0 --clips 2 "
        "--out {out}/quality.json",
        long=True,
    ),
    Smoke(command="training.quality --table {root}/results/quality.json"),
    Smoke(command="training.train_decoder --out {out} --steps 1"),
    Smoke(command="training.train_dit --out {out} --steps 1 --clips 64"),
    Smoke(command="training.train_rollouts --out {trained} --steps 1"),
    Smoke(command="tests.benchmarks.machine_code --table {root}/results/machine_code.json"),
    Smoke(command="benchmarks.stale"),
    Smoke(command="tests.support.rooms --words {lines} --json {out}/house.json"),
    Smoke(command="tests.support.settings_page"),
    Smoke(command="benchmarks.tables"),
)
ELSEWHERE = (
    Elsewhere(module="export.to_onnx", options="--case --no-check", test="test_export.test_a_golden_rollout_is_met"),
    Elsewhere(
        module="export.to_onnx",
        options="--config --models --dtype --out",
        test="test_commands.test_graphs_become_engines",
    ),
    Elsewhere(module="export.to_tensorrt", options="--library --out", test="test_commands.test_graphs_become_engines"),
    Elsewhere(
        module="benchmarks.serving", options="--serve --json --plot", test="test_benchmark.test_against_a_server"
    ),
    Elsewhere(
        module="benchmarks.engines",
        options="--graphs --tensorrt-engines",
        test="test_bench.test_what_was_exported_is_measured_beside_torch",
    ),
    Elsewhere(
        module="benchmarks.engines",
        options="--check --no-flex",
        test="test_bench.test_each_row_is_compared_with_torch",
    ),
    Elsewhere(
        module="longlive_serve.replay",
        options="--backend --fp8 --fp8-attention",
        test="test_fused_dit.test_replay_runs_it_in_fp8",
    ),
    Elsewhere(
        module="longlive_serve.triton_server", options="--config", test="test_commands.test_a_server_comes_and_goes"
    ),
    Elsewhere(
        module="longlive_serve.triton_server.python_version",
        test="test_install.test_make_says_what_is_wrong_with_python3_where_no_python_fits",
    ),
    Elsewhere(
        module="tests.project.portability",
        options="--only --json",
        test="test_portability.test_what_pytest_found_is_counted_and_an_earlier_setting_stays",
    ),
    Elsewhere(
        module="tests.project.cudnn_plans",
        test="test_cudnn_plans.test_an_h200_has_a_plan_for_every_size_and_multiplies_fp8_as_such",
    ),
    Elsewhere(
        module="tests.project.gpu_check", options="--json --seconds --toy", test="test_gpu_check.test_every_step_runs"
    ),
    Elsewhere(
        module="tests.benchmarks.machine_code",
        options="--preset --json",
        test="test_kernels_compile.test_every_kernel_compiles_and_none_spills_registers",
    ),
    Elsewhere(
        module="tests.project.tensorrt_types",
        test="test_tensorrt_types.test_a_call_that_a_version_does_not_have_is_seen",
    ),
    Elsewhere(
        module="stress.chaos",
        options="--kills --json",
        test="test_stress.test_viewers_lose_no_frame_while_servers_die",
    ),
    Elsewhere(
        module="stress.mtls_fleet",
        options="--json",
        test="test_stress.test_a_fleet_keeps_strangers_out_and_viewers_happy",
    ),
    Elsewhere(
        module="stress.fuzz", options="--requests --json", test="test_stress.test_wrong_requests_beside_live_sessions"
    ),
    Elsewhere(
        module="stress.soak", options="--minutes --json", test="test_stress.test_viewers_come_and_go_for_a_while"
    ),
)
SKIPPED = (
    Skipped(module="tests.support.settings_page", options="--write", reason="writes into docs/; a test compares"),
    Skipped(module="longlive_serve.doctor", options="--start", reason="benchmarks.start_up starts the same servers"),
    Skipped(
        module="longlive_client.cli.generate",
        options="--tls-ca",
        reason="needs a server with a trusted certificate",
    ),
    Skipped(module="deploy.checks.empty_environment", reason="downloads 2 GB; `make deploy-check` runs it"),
    Skipped(module="tests.project.smoke", options="--json", reason="runs all of these"),
    Skipped(
        module="benchmarks.serving.perf_analyzer",
        options="--concurrency --json",
        reason="downloads NVIDIA's perf_analyzer",
    ),
)
