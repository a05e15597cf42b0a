"""A herd on a registry with a connection limit: through nothing, three rivals and pullpool.

`python -m benchmarks herd` starts every part itself and plays in rounds:

- herd: 64 clients want one cold 64 MiB blob of a registry that allows 8 requests at a time, each at
  100 MB/s;
- herd-large: 8 clients want one of 256 MiB;
- shaped: 64 clients with lines of 100 Mbit/s (see `benchmarks.shaped`).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import shaped
from benchmarks.board import times
from benchmarks.charts import Bar, Chart
from benchmarks.images import Image, make_image
from benchmarks.parts import MIB, TIMES
from benchmarks.rounds import Crowd, Round, play, rounds_in_turn
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.subjects import SUBJECTS, Subject, chosen, with_absent
from benchmarks.tables import Row, herd_table, ratio_to_rival, row_of
from benchmarks.upstreams import limited_registry

CAP = 8
RATE = 100_000_000  # bytes a second for each connection
ROUNDS = 3

ABOUT = """\
A registry that allows 8 connections, each at 100 MB/s, answers 401 beyond, as Harbor does.
Everybody wants the same cold blob at once: straight, through docker-registry's pull-through cache,
through nginx with its cache lock tuned, through varnish, and through pullpool. *shaped*: clients
with lines of 100 Mbit/s, of whom nobody should be later than one that comes alone.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How large a scene is: clients, images, layers of an image, bytes of a layer."""

    clients: int
    images: int
    layers: int
    layer_size: int


@dataclass(frozen=True, slots=True)
class Scene:
    """A crowd to be opened in a directory, the columns it is judged by, and its two sizes."""

    name: str
    full: Size
    fast: Size
    open: Callable[[Path, Size], AbstractContextManager[Crowd]]
    table: Callable[[str, Sequence[Row]], Sheet]

    def title(self, size: Size) -> str:
        what = "cold image" if size.images == 1 else "cold images"
        layers = f"{size.layers} {TIMES} {size.layer_size / MIB:g} MiB"
        return f"{self.name}: {size.clients} clients, {size.images} {what}, {layers}, limit {CAP}"


@dataclass(frozen=True, slots=True)
class Played:
    """A scene that was played: a row for each subject, and how the upstream was set up."""

    scene: Scene
    size: Size
    rows: Sequence[Row]
    upstream: str


@contextlib.contextmanager
def open_herd(directory: Path, size: Size) -> Iterator[Crowd]:
    """Everybody wants the one layer, by digest, through a real registry at its limit."""
    (image,) = make_images(size)
    want = image.wanted_layer()
    with limited_registry(directory, [image], limit=CAP, rate=RATE) as upstream:
        yield Crowd(upstream, CAP, (want,) * size.clients, size.clients, want.size)


def make_images(size: Size) -> list[Image]:
    return [
        make_image(f"bench/image-{number}", layers=size.layers, layer_size=size.layer_size)
        for number in range(size.images)
    ]


SCENES = (
    Scene("herd", Size(64, 1, 1, 64 * MIB), Size(24, 1, 1, 4 * MIB), open_herd, herd_table),
    Scene("herd-large", Size(8, 1, 1, 256 * MIB), Size(4, 1, 1, 8 * MIB), open_herd, herd_table),
)


def measure(options: Options) -> Findings:
    """Plays the two scenes, and the shaped one. Raises PartFailed."""
    subjects = chosen(SUBJECTS, options)
    played = [play_scene(scene, subjects, options) for scene in SCENES]
    found = findings(ABOUT, played, options)
    board, upstream, sheet = shaped.play(options)
    return replace(
        found,
        sheets=(*found.sheets, sheet),
        promises=(*found.promises, *_speed(played), *shaped.promises(board)),
        configurations={**found.configurations, "the upstream of shaped": upstream},
        figures={**_all_figures(played), "shaped": board.figures()},
        charts=tuple(_charts(played[0])),
    )


def findings(about: str, played: Sequence[Played], options: Options) -> Findings:
    """Tables and counts of scenes, and what they promise alike."""
    fronts = {row.title: row.configuration for row in played[0].rows if row.configuration}
    upstreams = {f"the upstream of {each.scene.name}": each.upstream for each in played}
    sheets = (each.scene.table(each.scene.title(each.size), each.rows) for each in played)
    return Findings(
        about=about,
        sheets=tuple(with_absent(sheet, SUBJECTS, options) for sheet in sheets),
        promises=tuple(promise for each in played for promise in _promises(each)),
        configurations={**upstreams, **fronts},
        figures=_all_figures(played),
    )


def play_scene(
    scene: Scene, subjects: Sequence[Subject], options: Options, *, rounds: int = ROUNDS
) -> Played:
    """Plays all rounds of a scene. Raises PartFailed."""
    size = scene.fast if options.fast else scene.full
    number = 0 if options.fast else options.rounds or rounds
    order = rounds_in_turn(subjects, number, verifying=True)
    played: list[Round] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        scene.open(Path(name), size) as crowd,
    ):
        for turn, (subject, verify) in enumerate(order, 1):
            kind = "verifying" if verify else "timed"
            options.log(f"{scene.name} {turn}/{len(order)}: {subject.title} ({kind})")
            played.append(play(subject, crowd, Path(name), verify=verify, prime=not options.fast))
        unique, expected, upstream = crowd.unique_size, crowd.answers_expected, crowd.upstream
        found = {each: [one for one in played if one.subject == each.name] for each in subjects}
        rows = [Row(each.title, rounds, unique, expected) for each, rounds in found.items()]
        return Played(scene, size, rows, upstream.configuration)


def _promises(played: Played) -> Iterator[Promise]:
    """What pullpool has to reach in a scene; nothing when it did not run."""
    row = row_of(played.rows, "pullpool")
    if row is None:
        return
    name = played.scene.name
    served, peak = row.worst.served, max(one.upstream.peak or 0 for one in row.rounds)
    answers = f"{served} of {row.expected}"
    yield Promise(f"{name}: answer everything", f"{row.expected}", answers, row.is_whole)
    ratio = row.upstream_ratio
    yield Promise(f"{name}: fetch every byte once", "1.00", f"{ratio:.2f}", ratio < 1.005)
    if peak:
        yield Promise(f"{name}: stay within the cap", f"{CAP} sockets", str(peak), peak <= CAP)


def _speed(played: Sequence[Played]) -> Iterator[Promise]:
    for each, most in zip(played, (0.65, 0.45), strict=True):
        row, name = row_of(each.rows, "pullpool"), each.scene.name
        if row is not None and name == "herd":
            first, text = row.middle(lambda r: r.first_byte), row.time(lambda r: r.first_byte)
            kept = first is not None and first <= 0.05
            yield Promise("herd: first byte, median", "≤ 50 ms", text, kept)
        ratio = ratio_to_rival(each.rows, "pullpool", "nginx")
        if ratio is not None:
            what = f"{name}: last client done, beside nginx"
            yield Promise(what, f"≤ {most:g} {TIMES}", times(ratio), ratio <= most)


def _charts(played: Played) -> Iterator[Chart]:
    """When everybody had the blob, of those through whom everybody got it."""
    bars = [
        Bar(row.title, wall, row.time(lambda r: r.wall), *_spread(row), row.title == "pullpool")
        for row in played.rows
        if row.is_whole and (wall := row.middle(lambda r: r.wall)) is not None
    ]
    clients, size = played.size.clients, played.size.layer_size / MIB
    title = f"{clients} clients want one cold blob of {size:g} MiB: last one done"
    yield Chart("herd", title, "s", "less", tuple(bars))


def _spread(row: Row) -> tuple[float, float]:
    walls = [played.wall for played in row.timed]
    return min(walls), max(walls)


def _all_figures(played: Sequence[Played]) -> dict[str, object]:
    return {each.scene.name: _figures(each.rows) for each in played}


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    return {
        "summary": [row.summary() for row in rows],
        "rounds": [played.figures() for row in rows for played in row.rounds],
        "pullpool_to_nginx": ratio_to_rival(rows, "pullpool", "nginx"),
    }


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["herd", *sys.argv[1:]])
