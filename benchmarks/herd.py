"""Crowds on a registry with a connection limit: through nothing, two rivals and pullpool.

`python -m benchmarks herd` starts every part itself and plays three scenes in rounds:

- herd: 64 clients want one cold 64 MiB blob of a registry that allows 8 requests at a time, each at
  100 MB/s;
- crowd: 300 clients pull 20 cold images of 4 layers from the bundled registry, which allows 8
  sockets;
- crowd-real: the same in front of docker-registry, where only requests are limited.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import Image, make_image
from benchmarks.load import Want
from benchmarks.parts import MIB, TIMES
from benchmarks.rounds import Crowd, Round, play, rounds_in_turn
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.subjects import SUBJECTS, Subject, chosen
from benchmarks.tables import Row, crowd_table, herd_table, ratio_to_rival, row_of
from benchmarks.upstreams import Upstream, fake_registry, limited_registry

CAP = 8
RATE = 100_000_000  # bytes a second for each connection
ROUNDS = 3

ABOUT = """\
A registry that allows 8 connections, each at 100 MB/s, answers 401 beyond, as Harbor does. Crowds
come to it straight, through docker-registry's pull-through cache, through nginx with its cache lock
tuned, and through pullpool, everything cold. *herd*: everybody wants the same blob. *crowd*: each
client pulls one of 20 images from the bundled registry, which counts sockets when it accepts them.
*crowd-real*: the same in front of docker-registry behind nginx's `limit_conn`.
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
SCENES = (
    Scene("herd", HERD_FULL, HERD_FAST, open_herd, herd_table),
    Scene("crowd", CROWD_FULL, CROWD_FAST, open_crowd, crowd_table),
    Scene("crowd-real", CROWD_FULL, CROWD_FAST, open_crowd_real, crowd_table),
)


def measure(options: Options) -> Findings:
    """Plays the three scenes. Raises PartFailed."""
    subjects = chosen(SUBJECTS, options)
    played = [play_scene(scene, subjects, options) for scene in SCENES]
    fronts = {row.title: row.configuration for row in played[0].rows if row.configuration}
    upstreams = {f"the upstream of {each.scene.name}": each.upstream for each in played}
    return Findings(
        about=ABOUT,
        sheets=tuple(each.scene.table(each.scene.title(each.size), each.rows) for each in played),
        promises=tuple(promise for each in played for promise in _promises(each)),
        configurations={**upstreams, **fronts},
        figures={each.scene.name: _figures(each.rows) for each in played},
    )


def play_scene(scene: Scene, subjects: Sequence[Subject], options: Options) -> Played:
    """Plays all rounds of a scene. Raises PartFailed."""
    size = scene.fast if options.fast else scene.full
    number = 0 if options.fast else options.rounds or ROUNDS
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
    if name == "herd":
        yield from _speed(played.rows, row)


def _speed(rows: Sequence[Row], row: Row) -> Iterator[Promise]:
    first, ratio = row.middle(lambda r: r.first_byte), ratio_to_rival(rows, "pullpool", "nginx")
    text = row.time(lambda r: r.first_byte)
    yield Promise("herd: first byte, median", "≤ 0.1 s", text, first is not None and first <= 0.1)
    if ratio is not None:
        done = f"{ratio:.2f} {TIMES}"
        yield Promise("herd: last client done, beside nginx", f"≤ 0.7 {TIMES}", done, ratio <= 0.7)


def _figures(rows: Sequence[Row]) -> dict[str, object]:
    return {
        "summary": [row.summary() for row in rows],
        "rounds": [played.figures() for row in rows for played in row.rounds],
        "pullpool_to_nginx": ratio_to_rival(rows, "pullpool", "nginx"),
    }


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["herd", *sys.argv[1:]])
