"""An upstream that gives each connection little: what several at once gain for a large blob.

`python -m benchmarks segments` limits every connection to the upstream to 40 MB/s and lets pullpool
open eight. One client asks for a cold blob, of two sizes, and then eight clients for eight
different ones at once: then there is a connection for each, and nobody may wait longer for the
first byte than a turn lasts because another blob has taken several.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.board import Board, Measure, Played, count, milliseconds, play_in_turn, seconds
from benchmarks.load import Answer, Plan, Want
from benchmarks.parts import LOOPBACK, MIB, TIMES
from benchmarks.rounds import unleash
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import CACHES, Place, Subject
from proxy.upstream.origin import TURN_SECONDS

CAP = 8
RATE = 40_000_000  # bytes a second for each connection

ABOUT = """\
Every connection to the upstream gives 40 MB/s; pullpool may open eight. One client asks for a cold
blob of 96 MiB, then for one of 256 MiB; then eight clients ask for eight different blobs at once,
and no blob that has taken several connections may keep the first byte of another longer than a
turn. The rivals fetch a blob over one connection.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the two blobs for one client, and of each of the eight."""

    small: int
    large: int
    each: int


FULL, FAST = Size(96 * MIB, 256 * MIB, 64 * MIB), Size(4 * MIB, 8 * MIB, 2 * MIB)

FAILED = count("failed", "failed")


def alone(size: Size) -> tuple[Measure, ...]:
    """The columns of one client."""
    return (
        seconds("small", f"{size.small / MIB:g} MiB"),
        milliseconds("small_first", "first byte", ratio=True),
        seconds("large", f"{size.large / MIB:g} MiB"),
        milliseconds("large_first", "first byte", ratio=True),
    )


AT_ONCE = (
    seconds("many", "last done"),
    milliseconds("many_first", "last first byte", ratio=True),
    FAILED,
)


@dataclass(frozen=True, slots=True)
class Wants:
    """What is asked for: alone, alone, and all at once."""

    small: Want
    large: Want
    many: Sequence[Want]


def pulled(port: int, wants: Sequence[Want], *, verify: bool) -> list[Answer]:
    """The answers that are right."""
    plan = Plan(LOOPBACK, port, tuple(wants), verify)
    return [answer for answer in unleash(plan).answers if answer.is_served]


def play(
    subject: Subject, directory: Path, upstream: int, wants: Wants, *, verify: bool = False
) -> Played:
    """The three pulls, each of blobs that are cold."""
    values: dict[str, float] = {"failed": 0}
    with subject.start(Place(upstream, CAP, directory)) as front:
        for name, wanted in (
            ("small", [wants.small]),
            ("large", [wants.large]),
            ("many", wants.many),
        ):
            answers = pulled(front.port, wanted, verify=verify)
            values["failed"] += len(wanted) - len(answers)
            if len(answers) == len(wanted):
                values[name] = max(answer.ended for answer in answers)
                values[f"{name}_first"] = max(answer.first_byte or 0 for answer in answers)
        assert front.part is not None
        front.part.check()
        return Played(values, front.configuration)


def measure(options: Options) -> Findings:
    """Pulls through each subject in turn. Raises PartFailed."""
    size = FAST if options.fast else FULL
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        static_registry(Path(name), rate=RATE) as (upstream, shelf),
    ):
        wants = Wants(
            shelf.blob("bench/small", size.small),
            shelf.blob("bench/large", size.large),
            [shelf.blob(f"bench/many-{number}", size.each) for number in range(CAP)],
        )
        board = play_in_turn(
            "segments",
            CACHES,
            options,
            lambda subject, directory: play(
                subject, directory, upstream.port, wants, verify=options.fast
            ),
        )
    columns = alone(size)
    pace = f"{RATE / 1e6:g} MB/s a connection"
    many = f"{CAP} clients, {CAP} blobs of {size.each / MIB:g} MiB at once"
    return Findings(
        about=ABOUT,
        sheets=(
            board.sheet(f"segments: one client, {pace}, at most {CAP} of pullpool", columns),
            board.sheet(f"segments: {many}, {pace}", AT_ONCE),
        ),
        promises=tuple(_promises(board, size)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures=board.figures(),
        charts=(
            board.chart(
                "segments",
                f"A cold blob of {size.large / MIB:g} MiB, {pace}",
                columns[2],
                better="less",
            ),
        ),
    )


def _promises(board: Board, size: Size) -> Iterator[Promise]:
    for rival in ("registry", "nginx"):
        for key, times_faster in (("small", 5), ("large", 6)):
            what = f"{(size.small if key == 'small' else size.large) / MIB:g} MiB"
            yield from _faster(board, what, key, times_faster, rival)
    yield from board.promise("first byte", "large_first", "≤", 1.0)
    yield from board.bound(AT_ONCE[1], f"first byte of the last of {CAP} at once", TURN_SECONDS)
    yield from board.bound(FAILED, "pulls that failed", 0)


def _faster(board: Board, what: str, key: str, wanted: float, rival: str) -> Iterator[Promise]:
    ratio = board.ratio("pullpool", key, rival)
    if ratio:
        faster = 1 / ratio
        yield Promise(
            f"{what}, times faster than {rival}",
            f"≥ {wanted:g} {TIMES}",
            f"{faster:.2f} {TIMES}",
            faster >= wanted,
        )
