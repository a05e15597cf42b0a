"""`python -m benchmarks [SCENARIO…]`: measures, prints tables, writes the page of results."""

from __future__ import annotations

import importlib
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks import results
from benchmarks.parts import PROJECT, PartFailed, ended_by_signals, environment
from benchmarks.scenario import Findings, Options

#: In the order of the page; each is a module of this package (see `benchmarks.scenario`).
SCENARIOS = (
    "warm",
    "manifests",
    "cold",
    "segments",
    "herd",
    "crowd",
    "image",
    "memory",
    "scale",
    "workers",
    "overload",
    "fairness",
    "fleet",
    "fleet_sim",
    "fleet_directory",
)

PIPE_WIDTH = 160


def measure(name: str, options: Options) -> Findings:
    """Plays a scenario. Raises PartFailed."""
    module = importlib.import_module(f"benchmarks.{name}")
    findings: Findings = module.measure(options)
    return findings


@dataclass(frozen=True, slots=True)
class Processors:
    """CPU seconds by now: of the whole machine, and of this process and all that it waited for."""

    at: float
    machine: float
    own: float

    @classmethod
    def now(cls) -> Processors:
        user, nice, system, _idle, _iowait, *interrupts = map(
            int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        )
        usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return cls(
            at=time.monotonic(),
            machine=(user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK"),
            own=sum(usage.ru_utime + usage.ru_stime for usage in usages),
        )

    def told_since(self, before: Processors) -> str:
        """How much others used meanwhile, for the page."""
        others = (self.machine - before.machine) - (self.own - before.own)
        cores = max(0.0, others / (self.at - before.at))
        return f"{cores:.1f} of {os.cpu_count()} cores busy with other work"


def play(name: str, options: Options, command: str) -> tuple[Findings, dict[str, Any]]:
    """A scenario's findings, and its entry in the document. Raises PartFailed."""
    surroundings, before = environment(), Processors.now()
    findings = measure(name, options)
    surroundings["meanwhile"] = Processors.now().told_since(before)
    return findings, results.entry(findings, surroundings, command)


def show(console: Console, findings: Findings, surroundings: Mapping[str, str]) -> None:
    """Prints the tables, and which figures were reached."""
    for sheet in findings.sheets:
        console.print(sheet.for_terminal())
    for promise in findings.promises:
        mark = "reached" if promise.kept else "MISSED"
        console.print(f"{mark}: {promise.what}: {promise.measured}, wanted {promise.wanted}")
    console.print(" · ".join(f"{name} {value}" for name, value in surroundings.items()), "\n")


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(SCENARIOS), metavar="[SCENARIO]...")
@click.option("--rounds", type=click.IntRange(min=1), help="Rounds for each subject.")
@click.option("--fast", is_flag=True, help="Small and once: shows that it is right, not how fast.")
@click.option("--only", multiple=True, metavar="SUBJECT", help="nothing, registry, pullpool, …")
@click.option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where results.json and results.md go: docs/, or nowhere with --fast or --only.",
)
@click.option("--page", is_flag=True, help="Make results.md of results.json; measure nothing.")
def main(
    names: tuple[str, ...],
    rounds: int | None,
    fast: bool,
    only: tuple[str, ...],
    into: Path | None,
    page: bool,
) -> None:
    """Measures pullpool beside its rivals; all scenarios, or those named."""
    if page:
        results.write(into or PROJECT / "docs", {}, SCENARIOS)
        return
    # A file or a pipe has no width of its own; the tables are wider than what is assumed then.
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    options = Options(rounds, fast, frozenset(only), log=console.log)
    directory = into or (None if fast or only else PROJECT / "docs")
    flags = (f" --rounds {rounds}" if rounds else "") + (" --fast" if fast else "")
    failed = []
    with ended_by_signals():
        for name in names or SCENARIOS:
            try:
                findings, entry = play(name, options, f"python -m benchmarks {name}{flags}")
            except PartFailed as error:
                failed.append(f"{name}: {error}")
                console.log(f"{name} failed: {error}")
                continue
            show(console, findings, entry["environment"])
            if directory is not None:
                results.write(directory, {name: entry}, SCENARIOS)
    if failed:
        raise click.ClickException("\n".join(failed))


if __name__ == "__main__":
    main()
