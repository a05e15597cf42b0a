"""Crowds on a registry with a connection limit: through nothing, two rivals and pullpool.

`python -m benchmarks.herd` starts every part itself, plays its scenarios in rounds, prints tables:

- herd: 64 clients want one cold 64 MiB blob of a registry that allows 8 requests at a time, each at
  100 MB/s;
- crowd: 300 clients pull 20 cold images of 4 layers from the bundled registry, which allows 8
  sockets;
- crowd-real: the same in front of docker-registry, where only requests are limited.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from benchmarks.images import Image, make_image
from benchmarks.load import Want
from benchmarks.parts import MIB, TIMES, PartFailed, ended_by_signals, environment
from benchmarks.rounds import Crowd, Round, play, rounds_in_turn
from benchmarks.subjects import SUBJECTS, Subject
from benchmarks.tables import Row, crowd_table, environment_table, herd_table, ratio_to_rival
from benchmarks.upstreams import Upstream, fake_registry, limited_registry

CAP = 8
RATE = 100_000_000  # bytes a second for each connection
PIPE_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Size:
    """How large a scenario is: clients, images, layers of an image, bytes of a layer."""

    clients: int
    images: int
    layers: int
    layer_size: int


@dataclass(frozen=True, slots=True)
class Scenario:
    """A crowd to be opened in a directory, the columns it is judged by, and its two sizes."""

    name: str
    full: Size
    fast: Size
    open: Callable[[Path, Size], AbstractContextManager[Crowd]]
    table: Callable[[str, Sequence[Row]], Table]

    def title(self, size: Size) -> str:
        what = "cold image" if size.images == 1 else "cold images"
        layers = f"{size.layers} {TIMES} {size.layer_size / MIB:g} MiB"
        return f"{self.name}: {size.clients} clients, {size.images} {what}, {layers}, limit {CAP}"


@contextlib.contextmanager
def open_herd(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody wants the one layer, by digest, through a real registry at its limit."""
    (image,) = _images(size)
    want = image.wanted_layer()
    with limited_registry(directory, [image], limit=CAP, rate=RATE) as upstream:
        yield Crowd(upstream, CAP, (want,) * size.clients, size.clients, want.size)


@contextlib.contextmanager
def open_crowd(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody pulls one of the images by tag from the registry that counts at accept."""
    with fake_registry(
        directory,
        images=size.images,
        layers=size.layers,
        layer_size=size.layer_size,
        limit=CAP,
        rate=RATE,
    ) as upstream:
        yield _pulling(upstream, upstream.pulls, upstream.unique_size, size)


@contextlib.contextmanager
def open_crowd_real(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody pulls one of the images by tag from a real registry at its limit."""
    images = _images(size)
    with limited_registry(directory, images, limit=CAP, rate=RATE) as upstream:
        pulls = [image.wanted() for image in images]
        yield _pulling(upstream, pulls, sum(image.size for image in images), size)


def _images(size: Size) -> list[Image]:
    return [
        make_image(f"bench/image-{number}", layers=size.layers, layer_size=size.layer_size)
        for number in range(size.images)
    ]


def _pulling(upstream: Upstream, pulls: Sequence[Want], unique: int, size: Size) -> Crowd:
    """A crowd spread over the images; each client gets a manifest, a config and the layers."""
    wants = tuple(pulls[number % len(pulls)] for number in range(size.clients))
    return Crowd(upstream, CAP, wants, size.clients * (2 + size.layers), unique)


HERD_FULL, HERD_FAST = Size(64, 1, 1, 64 * MIB), Size(24, 1, 1, 4 * MIB)
CROWD_FULL, CROWD_FAST = Size(300, 20, 4, 3 * MIB // 2), Size(40, 5, 4, MIB // 8)
SCENARIOS = (
    Scenario("herd", HERD_FULL, HERD_FAST, open_herd, herd_table),
    Scenario("crowd", CROWD_FULL, CROWD_FAST, open_crowd, crowd_table),
    Scenario("crowd-real", CROWD_FULL, CROWD_FAST, open_crowd_real, crowd_table),
)


def run_scenario(
    scenario: Scenario, subjects: Sequence[Subject], *, rounds: int, fast: bool, console: Console
) -> list[Row]:
    """Plays all rounds of a scenario; one row for each subject."""
    size = scenario.fast if fast else scenario.full
    order = rounds_in_turn(subjects, 0 if fast else rounds, verifying=True)
    played: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        scenario.open(Path(name), size) as crowd,
    ):
        for turn, (subject, verify) in enumerate(order, 1):
            kind = "verifying" if verify else "timed"
            console.log(f"{scenario.name} {turn}/{len(order)}: {subject.title} ({kind})")
            played.append(play(subject, crowd, Path(name), verify=verify, prime=not fast))
        unique, expected = crowd.unique_size, crowd.answers_expected
    rows = {subject: [one for one in played if one.subject == subject.name] for subject in subjects}
    return [Row(subject.title, found, unique, expected) for subject, found in rows.items()]


def _show(console: Console, scenario: Scenario, rows: Sequence[Row], *, fast: bool) -> None:
    console.print(scenario.table(scenario.title(scenario.fast if fast else scenario.full), rows))
    ratio = ratio_to_rival(rows, "pullpool", "nginx")
    if ratio is not None:
        console.print(f"last client done, pullpool / nginx: {ratio:.2f} {TIMES}\n")


def _document(results: dict[str, list[Row]], surroundings: dict[str, str]) -> str:
    scenarios = {
        name: {
            "summary": [row.summary() for row in rows],
            "rounds": [played.figures() for row in rows for played in row.rounds],
            "pullpool_to_nginx": ratio_to_rival(rows, "pullpool", "nginx"),
        }
        for name, rows in results.items()
    }
    return json.dumps({"environment": surroundings, "scenarios": scenarios}, indent=2) + "\n"


def _installed(console: Console, names: Sequence[str]) -> list[Subject]:
    """The chosen subjects that this machine can run; says which it cannot."""
    chosen = [subject for subject in SUBJECTS if not names or subject.name in names]
    for subject in chosen:
        if not subject.is_installed:
            console.print(f"without {subject.title}: {subject.program} is not installed")
    return [subject for subject in chosen if subject.is_installed]


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Timed rounds for each subject.")
@click.option("--fast", is_flag=True, help="Small, one verifying round: right, not fast.")
@click.option("--only", multiple=True, type=click.Choice([subject.name for subject in SUBJECTS]))
@click.option(
    "--scenario", "names", multiple=True, type=click.Choice([each.name for each in SCENARIOS])
)
@click.option("--json", "target", type=click.Path(dir_okay=False, path_type=Path))
def main(
    rounds: int, fast: bool, only: tuple[str, ...], names: tuple[str, ...], target: Path | None
) -> None:
    """Measures crowds on a registry with a connection limit."""
    # A file or a pipe has no width of its own; the tables are wider than what is assumed then.
    console = Console() if sys.stdout.isatty() else Console(width=PIPE_WIDTH)
    subjects = _installed(console, only)
    surroundings = environment()
    results: dict[str, list[Row]] = {}
    with ended_by_signals():
        for scenario in SCENARIOS:
            if names and scenario.name not in names:
                continue
            try:
                results[scenario.name] = run_scenario(
                    scenario, subjects, rounds=rounds, fast=fast, console=console
                )
            except PartFailed as error:
                raise click.ClickException(f"{scenario.name}: {error}") from error
    console.print(environment_table(surroundings))
    for scenario in SCENARIOS:
        if scenario.name in results:
            _show(console, scenario, results[scenario.name], fast=fast)
    if target is not None:
        target.write_text(_document(results, surroundings))


if __name__ == "__main__":
    main()
