"""Growth: what becomes dearer when there is a thousand times as much of it?

`python -m benchmarks scale` measures pullpool only, each time with little and with much: the CPU of
a request with 10 and with 10,000 held images, the CPU of a reader of a flight and of each 256 KiB
that it is sent, with 100 and with 5,000 readers, the longest turn of the event loop while they came
and while they followed and how long a question took meanwhile, the start with an empty cache and
with 100,000 blobs, and one turn of the gate with 10 and with 10,000 waiting.
"""

from __future__ import annotations

import http.client
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.board import NONE, Board, Measure, Played, micros, milliseconds, play_in_turn
from benchmarks.charts import Bar, Chart
from benchmarks.full_cache import hold_blobs, hold_manifests
from benchmarks.gate import seconds_a_turn
from benchmarks.load import Plan, Want
from benchmarks.parts import (
    KIB,
    LOOPBACK,
    MIB,
    TIMES,
    Background,
    PartFailed,
    cpu_seconds,
    until,
)
from benchmarks.rounds import unleash
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.static import static_registry
from benchmarks.subjects import PULLPOOL, Front, Place, Subject, pullpool
from benchmarks.watched import WORTH, read_turns
from benchmarks.wrk import wrk
from proxy.store.files import Layout

CAP = 1  # a flight of one connection, whose pace is the upstream's
STEP = 256 * KIB
NOWHERE = 9  # the port of an upstream that nobody may need: all is held
CONNECTIONS = 64
LOOK = 0.005  # seconds between two questions to the event loop

ABOUT = """\
pullpool alone, with little and with much of the same. *Images*: wrk asks for held manifests by
digest in turn. *Readers*: all follow one flight whose upstream is slow, and read as fast as they
can; the cost of the flight itself (one reader) is taken off, the rest is for each reader and each
256 KiB. *Longest turn*: for how long the loop did not come round, told from inside by a timer
(`benchmarks/watched.py`), until every reader had a byte and from then on. *Question*: the longest
that `/livez` took to be answered meanwhile over an open connection, which is several turns, and
time that both ends wait for one of the two cores that the clients share. *Start*: from the command
to `/readyz`, of a cache that another process has left; *first start*: the first one since the
machine's own, at which files may have lost bytes, so that each is looked at before any is served.
*Turn*: a slot is given back and granted to the next; the clock's own time is taken off.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Little and much: images, readers, blobs at the start, waiting tickets. `lasting`: seconds of
    a load; `blob`: bytes that are read; `rates`: the upstream's, for few and for many readers;
    `repeats` of the pulls by few and by one alone, so that the clock's ticks do not count; turns of
    the gate."""

    images: tuple[int, int]
    readers: tuple[int, int]
    blobs: tuple[int, int]
    waiting: tuple[int, int]
    lasting: float
    blob: int
    rates: tuple[int, int]
    repeats: int
    turns: int


FULL = Size(
    (10, 10_000),
    (100, 5_000),
    (0, 100_000),
    (10, 10_000),
    3.0,
    4 * MIB,
    (4 * MIB, MIB // 2),
    5,
    5_000,
)
FAST = Size((5, 50), (5, 50), (0, 500), (10, 500), 1.0, MIB, (8 * MIB, 8 * MIB), 1, 200)

#: What is measured with little and with much: name, what there is of it, bounds.
MEASURES = (
    micros("images", "CPU a request"),
    micros("readers", "CPU a reader and 256 KiB"),
    milliseconds("arrival", "longest turn of the loop while they come"),
    milliseconds("stall", "longest turn of the loop while they follow"),
    milliseconds("arrival_asked", "slowest question while they come"),
    milliseconds("follow_asked", "slowest question while they follow"),
    milliseconds("start", "start"),
    milliseconds("first", "first start"),
    micros("turn", "a turn of the gate"),
)


@dataclass(slots=True)
class Stalls(Background):
    """Asks `/livez` again and again while its block lasts: when, and how long the answer took."""

    port: int
    asked: list[tuple[float, float]] = field(default_factory=list)

    def _work(self) -> None:
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        try:
            while not self._end.wait(LOOK):
                began = time.monotonic()
                connection.request("GET", "/livez")
                connection.getresponse().read()
                self.asked.append((began, time.monotonic() - began))
        finally:
            connection.close()

    def worst(self, moment: float) -> tuple[float, float]:
        """The longest before a moment, and from then on; of all where nothing was asked there.

        Raises PartFailed when nothing was answered at all.
        """
        if not self.asked:
            raise PartFailed("/livez was never answered")
        all_took = [took for _, took in self.asked]
        before = [took for began, took in self.asked if began < moment]
        after = [took for began, took in self.asked if began >= moment]
        return max(before or all_took), max(after or all_took)


def request_cpu(subject: Subject, directory: Path, images: int, lasting: float) -> float:
    """CPU seconds of a request for one of so many held manifests. Raises PartFailed."""
    wants = hold_manifests(directory / "cache", images)
    paths = directory / "paths"
    paths.write_text("".join(f"{want.path}\n" for want in wants))
    with subject.start(Place(NOWHERE, CAP, directory, access_log=True)) as front:
        assert front.part is not None
        asked, patience = 0, 1.0
        while asked < images:  # each load begins with the first: one of them has to get round
            asked = wrk(
                front.port, "/v2/", connections=CONNECTIONS, lasting=patience, paths=paths
            ).requests
            patience *= 2
        before = cpu_seconds(front.part.pid)
        done = wrk(front.port, "/v2/", connections=CONNECTIONS, lasting=lasting, paths=paths)
        spent = cpu_seconds(front.part.pid) - before
        if done.failed:
            raise PartFailed(f"{done.failed} requests for held manifests failed")
        return spent / done.requests


def start_seconds(subject: Subject, directory: Path, blobs: int) -> tuple[float, float]:
    """From the command until it says that it is ready, with so many held blobs: when nobody has
    started on them yet, and again once that one has proved them. Raises PartFailed."""
    hold_blobs(directory / "cache", blobs)
    os.sync()  # what is held for long is on the disk
    proved, place = Layout(directory / "cache").boot, Place(NOWHERE, CAP, directory)
    began = time.monotonic()
    with subject.start(place):
        first = time.monotonic() - began
        until(proved.exists, "the blobs to be proved")
    began = time.monotonic()
    with subject.start(place):
        return first, time.monotonic() - began


def flight_cpu(front: Front, want: Want, readers: int) -> tuple[float, float]:
    """CPU seconds of one cold pull by so many at once, and when the last had its first byte.

    Raises PartFailed.
    """
    assert front.part is not None
    before = cpu_seconds(front.part.pid)
    report = unleash(Plan(LOOPBACK, front.port, (want,) * readers, verify=False))
    spent = cpu_seconds(front.part.pid) - before
    served = sum(answer.is_served for answer in report.answers)
    if served < readers:
        raise PartFailed(f"{readers - served} of {readers} readers of a flight were not served")
    return spent, report.epoch + max(answer.first_byte or 0 for answer in report.answers)


def follow(directory: Path, size: Size, *, many: bool) -> dict[str, float]:
    """CPU seconds of a reader for each step, beyond those of the flight; and the worst stalls."""
    turns = directory / "turns"
    readers, rate = size.readers[many], size.rates[many]
    repeats = 1 if many else size.repeats
    for name in ("upstream", "front"):
        (directory / name).mkdir(parents=True)
    with (
        static_registry(directory / "upstream", rate=rate) as (upstream, shelf),
        pullpool(Place(upstream.port, CAP, directory / "front"), turns=turns) as front,
    ):
        assert front.admin is not None
        blobs = [shelf.blob(f"bench/{number}", size.blob) for number in range(2 * repeats + 1)]
        flight_cpu(front, blobs.pop(), 1)  # the first of all is dearer
        alone = sum(flight_cpu(front, blobs.pop(), 1)[0] for _ in range(repeats))
        together, worst = 0.0, []
        for _ in range(repeats):
            began = time.monotonic()
            with Stalls(front.admin) as stalls:
                spent, all_there = flight_cpu(front, blobs.pop(), readers)
            together += spent
            worst.append((*longest(turns, began, all_there), *stalls.worst(all_there)))
    steps = repeats * (readers - 1) * max(1, size.blob // STEP)
    names = ("arrival", "stall", "arrival_asked", "follow_asked")
    stalls_found = (max(found) for found in zip(*worst, strict=True))
    return {
        "readers": max(0.0, together - alone) / steps,
        **dict(zip(names, stalls_found, strict=True)),
    }


def longest(turns: Path, began: float, all_there: float) -> tuple[float, float]:
    """How long the longest turn of the loop was that began between the two, and of those after:
    ``WORTH`` if none was worth writing down, as none was longer."""
    found = read_turns(turns)
    before = (each.late for each in found if began <= each.began < all_there)
    after = (each.late for each in found if each.began >= all_there)
    return max(before, default=WORTH), max(after, default=WORTH)


def play(subject: Subject, directory: Path, size: Size) -> Played:
    """Everything with little, and everything with much."""
    values: dict[str, float] = {}
    for many, name in ((False, "little"), (True, "much")):
        places = [_made(directory / f"{part}-{name}") for part in ("images", "start", "readers")]
        first, again = start_seconds(subject, places[1], size.blobs[many])
        found = {
            "images": request_cpu(subject, places[0], size.images[many], size.lasting),
            "start": again,
            "first": first,
            "turn": seconds_a_turn(size.waiting[many], size.turns),
            **follow(places[2], size, many=many),
        }
        values |= {f"{key}_{name}": value for key, value in found.items()}
    return Played(values)


def _made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def measure(options: Options) -> Findings:
    """Measures pullpool with little and with much. Raises PartFailed."""
    size = FAST if options.fast else FULL
    board = play_in_turn(
        "scale",
        (PULLPOOL,),
        options,
        lambda subject, directory: play(subject, directory, size),
        rounds=2,
    )
    return Findings(
        about=ABOUT,
        sheets=(_sheet(board, size),),
        promises=tuple(_promises(board)),
        figures=board.figures(),
        charts=(_chart(board, size),),
    )


def _amounts(size: Size) -> Sequence[tuple[Measure, str, tuple[int, int]]]:
    readers = size.readers
    blobs = size.blobs
    numbers = (size.images, *[readers] * 5, blobs, blobs, size.waiting)
    names = ("held images", *["readers"] * 5, *["held blobs"] * 2, "waiting")
    return list(zip(MEASURES, names, numbers, strict=True))


def _sheet(board: Board, size: Size) -> Sheet:
    rows = []
    for measure, what, (little, much) in _amounts(size):
        small, large = (board.median("pullpool", f"{measure.key}_{n}") for n in ("little", "much"))
        ratio = f"{large / small:.2f} {TIMES}" if small and large else NONE
        cells = (f"{little:,}", measure.text(small), f"{much:,}", measure.text(large), ratio)
        rows.append((f"{measure.title}, {what}", *cells))
    return Sheet("scale: pullpool", ("", "little", "", "much", "", "ratio"), tuple(rows))


def _promises(board: Board) -> Iterator[Promise]:
    for key, what in (
        ("images", "CPU of a request, 10 to 10,000 images"),
        ("readers", "CPU of a reader, 100 to 5,000 readers"),
    ):
        small, large = (board.median("pullpool", f"{key}_{n}") for n in ("little", "much"))
        if small and large:
            ratio = large / small
            yield Promise(what, f"≤ 1.3 {TIMES}", f"{ratio:.2f} {TIMES}", ratio <= 1.3)
    for measure, what, most in (
        (MEASURES[3], "longest turn of the loop while 5,000 follow", 0.06),
        (MEASURES[6], "start with 100,000 blobs", 1.0),
        (MEASURES[8], "a turn with 10,000 waiting", 20e-6),
    ):
        found = board.all("pullpool", f"{measure.key}_much")
        if found:
            text, worst = measure.text(max(found)), max(found)
            yield Promise(what, f"≤ {measure.text(most)}", text, worst <= most)


def _chart(board: Board, size: Size) -> Chart:
    bars = []
    for measure, what, (little, much) in _amounts(size)[:2]:
        for number, name in ((little, "little"), (much, "much")):
            values = board.all("pullpool", f"{measure.key}_{name}")
            middle = board.median("pullpool", f"{measure.key}_{name}")
            if middle is not None:
                spread = (min(values) / measure.factor, max(values) / measure.factor)
                text = measure.text(middle)
                bars.append(
                    Bar(
                        f"{number:,} {what}",
                        middle / measure.factor,
                        text,
                        *spread,
                        ours=name == "much",
                    )
                )
    title = "CPU a request, and a reader and 256 KiB, with little and with much"
    return Chart("scale", title, MEASURES[0].unit, "less", tuple(bars))
