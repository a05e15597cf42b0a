"""A large blob that nobody has yet, by one client: how fast, and what a gigabyte costs.

`python -m benchmarks cold` has each subject fetch it from a registry of files that gives all it
can. pullpool hashes every byte before it counts as right and keeps the last back until then; the
rivals pass on what comes. CPU is that of the subject until it has fallen quiet, so that what it
does after the client has gone (writing, hashing, fetching again) counts as well.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.board import (
    GIGABYTE,
    Board,
    Played,
    count,
    cpu_per_gigabyte,
    megabytes,
    milliseconds,
    play_in_turn,
    seconds,
)
from benchmarks.load import Plan, Want
from benchmarks.parts import LOOPBACK, MIB, settled
from benchmarks.rounds import unleash
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import CACHES, Place, Subject

CAP = 16

ABOUT = """\
One client asks for a blob of 256 MiB that no cache has yet; the upstream, a registry of files,
gives all it can. pullpool hashes every byte and keeps the last back until the digest is right; the
rivals pass on what comes. CPU is that of the subject until it has fallen quiet, what it does after
the client has gone included.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the blob."""

    blob: int


FULL, FAST = Size(256 * MIB), Size(8 * MIB)

MEASURES = (
    megabytes("rate", "rate"),
    seconds("wall", "done"),
    milliseconds("first_byte", "first byte"),
    cpu_per_gigabyte("cpu", "CPU"),
    count("failed", "failed"),
)


def play(
    subject: Subject, directory: Path, upstream: int, want: Want, *, verify: bool = False
) -> Played:
    """One pull from cold."""
    with subject.start(Place(upstream, CAP, directory)) as front:
        assert front.part is not None
        before = settled(front.part)
        (answer,) = unleash(Plan(LOOPBACK, front.port, (want,), verify)).answers
        cpu = settled(front.part) - before
        front.part.check()
        if not answer.is_served or answer.first_byte is None:
            return Played({"failed": 1}, front.configuration)
        values = {
            "wall": answer.ended - answer.began,
            "first_byte": answer.first_byte - answer.began,
            "rate": want.size / (answer.ended - answer.began),
            "cpu": cpu / want.size * GIGABYTE,
            "failed": 0,
        }
        return Played(values, front.configuration)


def measure(options: Options) -> Findings:
    """Pulls through each subject in turn. Raises PartFailed."""
    size = FAST if options.fast else FULL
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        static_registry(Path(name)) as (upstream, shelf),
    ):
        want = shelf.blob("bench/cold", size.blob)
        board = play_in_turn(
            "cold",
            CACHES,
            options,
            lambda subject, directory: play(
                subject, directory, upstream.port, want, verify=options.fast
            ),
        )
    what = f"{size.blob / MIB:g} MiB, one client"
    return Findings(
        about=ABOUT,
        sheets=(board.sheet(f"cold: {what}", MEASURES),),
        promises=tuple(_promises(board)),
        configurations={"the upstream": upstream.configuration, **board.configurations()},
        figures=board.figures(),
        charts=(
            board.chart("cold-rate", f"A cold blob, {what}", MEASURES[0], better="more"),
            board.chart("cold-cpu", f"CPU a gigabyte, cold, {what}", MEASURES[3], better="less"),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    yield from board.promise("rate", "rate", "≥", 0.65)
    yield from board.promise("rate", "rate", "≥", 0.65, rival="registry")
    yield from board.promise("CPU per GB", "cpu", "≤", 0.45, rival="registry")
    yield from board.bound(MEASURES[-1], "pulls that failed", 0)
