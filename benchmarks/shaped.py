"""A herd of clients with slow lines: is anybody slower than alone?

64 clients, each with a line of 100 Mbit/s, want one cold blob of the registry that allows 8
requests at a time; before that one of them has pulled another one alone. A part of the scenario
`herd`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.board import Board, Measure, Played, count, play_in_turn, seconds
from benchmarks.images import make_image
from benchmarks.load import Plan, Want
from benchmarks.parts import LOOPBACK, MIB, TIMES
from benchmarks.rounds import unleash
from benchmarks.scenario import Options, Promise, Sheet
from benchmarks.subjects import CACHES, Place, Subject
from benchmarks.upstreams import limited_registry

CAP = 8
RATE = 100_000_000  # bytes a second for each connection to the upstream
LINE = 100_000_000 // 8  # bytes a second of each client's line
#: How much later than alone still counts as no later: clocks and the clients' own pace.
LATER = 1.05


@dataclass(frozen=True, slots=True)
class Size:
    """Clients, and bytes of the blob."""

    clients: int
    blob: int


FULL, FAST = Size(64, 32 * MIB), Size(8, MIB)

MEASURES = (
    seconds("alone", "alone", ratio=False),
    seconds("slowest", "slowest of the herd"),
    Measure("later", f"{TIMES} alone", TIMES, ratio=False),
    count("failed", "failed"),
)


def play_subject(
    subject: Subject, directory: Path, upstream: int, wants: tuple[Want, Want], size: Size
) -> Played:
    """One client alone, then all of them; both cold."""
    alone, together = wants
    with subject.start(Place(upstream, CAP, directory)) as front:

        def pull(want: Want, clients: int) -> list[float]:
            plan = Plan(LOOPBACK, front.port, (want,) * clients, verify=False, rate=LINE)
            return [each.ended for each in unleash(plan).answers if each.is_served]

        first, found = pull(alone, 1), pull(together, size.clients)
        failed = 1 + size.clients - len(first) - len(found)
        if failed:
            return Played({"failed": failed}, front.configuration)
        values = {"alone": first[0], "slowest": max(found), "failed": 0}
        return Played({**values, "later": max(found) / first[0]}, front.configuration)


def play(options: Options) -> tuple[Board, str, Sheet]:
    """The board, how the upstream was set up, and the table. Raises PartFailed."""
    size = FAST if options.fast else FULL
    images = [
        make_image(f"bench/shaped-{number}", layers=1, layer_size=size.blob) for number in range(2)
    ]
    wants = images[0].wanted_layer(), images[1].wanted_layer()
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        limited_registry(Path(name), images, limit=CAP, rate=RATE) as upstream,
    ):
        board = play_in_turn(
            "shaped",
            CACHES,
            options,
            lambda subject, directory: play_subject(subject, directory, upstream.port, wants, size),
        )
    title = f"shaped: {size.clients} clients with 100 Mbit/s each, {size.blob / MIB:g} MiB"
    return board, upstream.configuration, board.sheet(title, MEASURES)


def promises(board: Board) -> Iterator[Promise]:
    """Nobody fails, and nobody is later than alone, in the worst round."""
    yield from board.bound(MEASURES[-1], "shaped: pulls that failed", 0)
    found = board.all("pullpool", "later")
    if found:
        text = f"{max(found):.2f} {TIMES}"
        yield Promise(
            "shaped: slowest, beside alone", f"≤ {LATER} {TIMES}", text, max(found) <= LATER
        )
