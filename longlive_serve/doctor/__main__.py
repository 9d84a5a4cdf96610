# SPDX-License-Identifier: Apache-2.0
"""Can this machine serve? `python -m longlive_serve.doctor` looks at what is installed, the GPU, the machine, the
settings and the memory that they take, and says of all that is not well what to do. It takes the server's options.

It loads no model and changes nothing. With `--start` it starts a server with these settings as well, twice, and says
how long that takes. Exit code 0: a server would start; 1: something stands in the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longlive_serve.config.serve_config import AUTO, ServeConfig
from longlive_serve.doctor import backends, gpu, machine, memory, settings, software
from longlive_serve.doctor.check_result import NOTE, OK, PROBLEM, WARNING, Section, lines_of, paint, wrap
from longlive_serve.doctor.ports import ports, tls
from longlive_serve.protocol.errors import ServerStartError
from longlive_serve.triton_server.arguments import DEFAULT_CONFIG, DEFAULT_PORTS, add_server_arguments
from longlive_serve.triton_server.tls_files import TlsFiles

WIDEST = 118


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """All that was found."""

    sections: Sequence[Section]
    can_serve: bool
    summary: str
    memory: dict[str, Any] | None
    """`sizing.ServerMemory` in bytes; None: the settings cannot be read."""
    start: dict[str, dict[str, float]] | None = None
    """`start.measure`; None: it was not asked for, or fails."""


def examine(path: Path, host: str, wanted: Mapping[str, int], files: TlsFiles) -> Report:
    """`path`: the settings file; `wanted`: the ports by name; `files`: of TLS."""
    config, read = settings.read(path)
    asked = config.device if config else AUTO
    gpus = gpu.find_gpus()
    used = gpu.used_gpu(gpus, asked)
    device = ("cuda" if used and software.torch_cuda() else "cpu") if asked == AUTO else asked.partition(":")[0]
    planned = "cuda" if used else device  # when PyTorch for CUDA is there as well
    here = backends.here(device, used)
    sections = [
        Section("Software", software.software()),
        Section("Triton Inference Server", software.triton_server()),
        Section("GPU", gpu.gpu_results(gpus, used, asked)),
        Section("Backends", backends.backend_results(here, device)),
        Section("Machine", [*machine.results(config), *ports(host, wanted), *tls(files)]),
    ]
    title, choice, needs = f"Settings: {path}", {}, None
    if config is None:
        sections.append(Section(title, [read]))
    else:
        choice = backends.chosen(config)
        results = [read, *backends.chosen_results(config, choice, here, device, used)]
        sections.append(Section(title, results + settings.files(config, choice, used)))
        found = memory.memory_results(config, choice, planned, used, machine.usable_memory())
        sections.append(Section("Memory", found))
        needs = dataclasses.asdict(memory.needed(config, choice, planned))
    can_serve, summary = _summary(sections, config, choice, device)
    return Report(sections=sections, can_serve=can_serve, summary=summary, memory=needs)


def with_start(report: Report, path: Path) -> Report:
    """The report of a machine that can serve, with how long its start takes."""
    from longlive_serve.doctor import start  # it needs a server's packages

    try:
        seconds = start.measure(path)
    except ServerStartError as error:
        failure = start.failure(error)
        section, summary = Section("Start", [failure]), f"cannot serve here: {failure.subject}: {failure.found}"
        return dataclasses.replace(report, sections=[*report.sections, section], can_serve=False, summary=summary)
    section = Section("Start", start.results(seconds))
    return dataclasses.replace(report, sections=[*report.sections, section], start=seconds)


def _summary(
    sections: Sequence[Section], config: ServeConfig | None, choice: Mapping[str, str], device: str
) -> tuple[bool, str]:
    """Whether it can serve, and with what, or why not."""
    results = [result for section in sections for result in section.results]
    problems = [result for result in results if result.level == PROBLEM]
    if problems or config is None:
        return False, "cannot serve here: " + "; ".join(
            f"{one.subject}: {textwrap.shorten(one.found, 60, placeholder='...')}" for one in problems
        )
    others = [(sum(one.level == level for one in results), level) for level in (WARNING, NOTE)]
    counts = ", ".join(f"{count} {level}{'s' * (count > 1)}" for count, level in others if count)
    what = f"preset {config.preset} with {' and '.join(dict.fromkeys(choice.values()))}"
    return True, f"can serve here: {what} on the {'CPU' if device == 'cpu' else 'GPU'}" + (counts and f" ({counts})")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m longlive_serve.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_server_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    text = "start a server with these settings, with empty caches and again, and say what takes how long"
    parser.add_argument("--start", action="store_true", help=text)
    args = parser.parse_args(argv)
    path, wanted = args.config or DEFAULT_CONFIG, {name: getattr(args, f"{name}_port") for name in DEFAULT_PORTS}
    try:
        files = TlsFiles(cert=args.tls_cert, key=args.tls_key, client_ca=args.tls_client_ca)
    except ValueError as error:
        parser.error(str(error))
    report = examine(path.absolute(), args.host, wanted, files)
    if args.start and report.can_serve:
        report = with_start(report, path.absolute())
    if args.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
    else:
        _show(report)
    return 0 if report.can_serve else 1


def _show(report: Report) -> None:
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    for line in lines_of(report.sections, width, colours):
        print(line)
    level = OK if report.can_serve else PROBLEM
    first, *others = wrap(f"{level}: {report.summary}", width, 2)
    print("\n".join([first.replace(level, paint(level), 1) if colours else first, *others]))


if __name__ == "__main__":
    sys.exit(main())
