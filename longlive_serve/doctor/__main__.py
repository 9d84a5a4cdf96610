# SPDX-License-Identifier: Apache-2.0
"""Can this machine serve? `python -m longlive_serve.doctor` checks the installed software, the GPU, the machine, the
settings and the memory that they need. For everything that is wrong it says what to do. It takes the server's options.

It loads no model and changes nothing. With `--start` it also starts a server with these settings, twice, and reports
how long that takes. Exit code 0: a server would start; 1: it would not.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_serve.config.serve_config import AUTO
from longlive_serve.doctor import backends, gpu, machine, memory, settings, software
from longlive_serve.doctor.check_result import ERROR, NOTE, OK, WARNING, CheckResult, Section, format_sections, wrap
from longlive_serve.doctor.ports import check_ports, check_tls
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG, DEFAULT_PORTS, add_server_arguments
from longlive_serve.triton_server.tls_files import TlsFiles

MAX_WIDTH = 118


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """The results of all checks."""

    sections: Sequence[Section]
    can_serve: bool
    summary: str
    memory: dict[str, Any] | None
    """`memory_model.ServerMemory` in bytes; None: the settings cannot be read."""
    start: dict[str, dict[str, float]] | None = None
    """`start.measure_starts`; None: it was not requested, or it failed."""


def run_checks(path: Path, host: str, ports: Mapping[str, int], tls: TlsFiles, with_start: bool = False) -> Report:
    """`path`: the settings file; `ports`: by name; `with_start`: start a server as well, if it can serve."""
    config, read_result = settings.read_settings(path)
    setting = config.device if config else AUTO
    gpus = gpu.find_gpus()
    selected_gpu = gpu.select_gpu(gpus, setting)
    device = ("cuda" if selected_gpu and software.torch_cuda() else "cpu") if setting == AUTO else setting.split(":")[0]
    available = backends.find_backends(device, selected_gpu)
    sections = [
        Section("Software", software.check_software()),
        Section("Triton Inference Server", software.check_triton()),
        Section("GPU", gpu.check_gpu(gpus, selected_gpu, setting)),
        Section("Backends", backends.check_backends(available, device)),
        Section("Machine", [*machine.check_machine(config), *check_ports(host, ports), *check_tls(tls)]),
    ]
    title, required, success = f"Settings: {path}", None, ""
    if config is None:
        sections.append(Section(title, [read_result]))
    else:
        selected = backends.select_backends(config)
        results = backends.check_selection(config, selected, available, device, selected_gpu)
        files = settings.check_files(config, selected, selected_gpu)
        sections.append(Section(title, [read_result, *results, *files]))
        memory_device = "cuda" if selected_gpu else device  # also where PyTorch for CUDA is still missing
        results = memory.check_memory(config, selected, memory_device, selected_gpu, machine.main_memory())
        sections.append(Section("Memory", results))
        required = dataclasses.asdict(memory.required_memory(config, selected, memory_device))
        success = f"preset {config.preset} with {' and '.join(dict.fromkeys(selected.values()))} on {device}"
    starts = None
    if with_start and not any(result.level == ERROR for section in sections for result in section.results):
        from longlive_serve.doctor import start  # needs the packages of a server

        try:
            starts = start.measure_starts(path)
            sections.append(Section("Start", start.format_starts(starts)))
        except ServerStartError as error:
            result = CheckResult(ERROR, "start", str(error), "see the log in this message")
            sections.append(Section("Start", [result]))
    can_serve, summary = _summarize(sections, success)
    return Report(sections=sections, can_serve=can_serve, summary=summary, memory=required, start=starts)


def _summarize(sections: Sequence[Section], success: str) -> tuple[bool, str]:
    """Whether it can serve, and a sentence; `success`: what it would serve."""
    results = [result for section in sections for result in section.results]
    errors = [result for result in results if result.level == ERROR]
    if errors:
        texts = (f"{one.name}: {textwrap.shorten(one.message, 60, placeholder='...')}" for one in errors)
        return False, f"cannot serve here: {'; '.join(texts)}"
    counts = [(sum(result.level == level for result in results), level) for level in (WARNING, NOTE)]
    text = ", ".join(f"{count} {level}{'s' * (count > 1)}" for count, level in counts if count)
    return True, f"can serve here: {success}" + (text and f" ({text})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m longlive_serve.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    text = "also start a server with these settings, with empty caches and again, and report the seconds by phase"
    parser.add_argument("--start", action="store_true", help=text)
    args = parser.parse_args(argv)
    path, ports = args.config or DEFAULT_CONFIG, {name: getattr(args, f"{name}_port") for name in DEFAULT_PORTS}
    try:
        tls = TlsFiles(cert=args.tls_cert, key=args.tls_key, client_ca=args.tls_client_ca)
    except ValueError as error:
        parser.error(str(error))
    report = run_checks(path.absolute(), args.host, ports, tls, args.start)
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
        lines = [*format_sections(report.sections, width)]
        print("\n".join([*lines, *wrap(f"{OK if report.can_serve else ERROR}: {report.summary}", width, 2)]))
    return 0 if report.can_serve else 1


if __name__ == "__main__":
    sys.exit(main())
