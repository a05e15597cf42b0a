"""Several processes, one cache (`pullpool serve --workers N`): what does the second one bring?

`python -m benchmarks workers` measures pullpool only, with one worker and with two in turn: wrk
asks for a held manifest by digest over 64 connections, answered by the hot path and again, with
that turned off, by aiohttp's handler; a crowd asks for a large held blob over 8. Then the leader of
two workers is killed while it fills a blob for the other one's client (`takeover.py`).
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from benchmarks import takeover
from benchmarks.board import Board, Measure, Played, count, megabytes, per_second, play_in_turn
from benchmarks.images import make_image
from benchmarks.load import Answer, Plan, Want
from benchmarks.parts import KIB, LOOPBACK, MIB, cpu_seconds, settled
from benchmarks.rounds import unleash
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import Front, Place, Subject, pullpool, two_workers
from benchmarks.warm import fetch
from benchmarks.wrk import wrk

CAP = 16
SMALL_CONNECTIONS, LARGE_CONNECTIONS = 64, 8
TICK = 0.01  # seconds; less CPU than that cannot be told from none

ABOUT = """\
pullpool alone, with one worker and with two in turn, access logs on. wrk asks for a held manifest
by digest over 64 connections, always in the same bytes: once of the hot path, once (`hot_path =
false`) of aiohttp's handler. Then clients ask for a large held blob over 8 connections, again and
again, and have the kernel drop the bytes unread; their rate is that until the first of them has had
all it wants. CPU is that of all processes of the service: the supervisor, the workers, and those
that have ended. The clients share the cores with them, as cheaply as can be: wrk has one thread,
makes its request once and runs no script while it asks. How many cores the service and the clients
kept busy stands beside each rate; what the clients take a second worker cannot have. Beside
aiohttp's handler that is little, so that there the rate shows what the second one brings; else it
is much, and what a CPU-second does says more.

*Takeover*: a client pulls a cold blob through the worker that follows, from the bundled registry,
slowly: over one connection, in order, and over eight. Once the registry has sent a quarter of it
the worker that leads is killed (SIGKILL). From that moment are counted: *leads*, until the other
one does (by its log); *goes on*, until the client has a byte that the dead one had not passed on;
*whole*, until the replacement serves. The client hashes what it gets; the registry counts the bytes
that it sends and the requests beyond its limit, which is the cap.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers that the manifest names and seconds that it is asked for, bytes of the blob and how
    often each client asks for it."""

    layers: int
    lasting: float
    blob: int
    each: int


FULL, FAST = Size(8, 4.0, 64 * MIB, 16), Size(8, 1.0, 2 * MIB, 32)


ONE = Subject("one", "pullpool, one worker", "", pullpool)
TWO = Subject("pullpool", "pullpool, two workers", "", two_workers)


def _beside_cores(rate: Measure, economy: Measure, key: str) -> Sequence[Measure]:
    cores = Measure(f"{key}_cores", "cores", "", ratio=False)
    return rate, economy, cores, Measure(f"{key}_client_cores", "clients' cores", "", ratio=False)


def _requests(key: str) -> Sequence[Measure]:
    economy = Measure(f"{key}_economy", "a CPU-second", "", 1.0, 0)
    return _beside_cores(per_second(f"{key}_rate", "rate"), economy, key)


def _blob() -> Sequence[Measure]:
    economy = Measure("blob_economy", "a CPU-second", "MB", 1e6, 0)
    return _beside_cores(megabytes("blob_rate", "rate"), economy, "blob")


HOT, HANDLER = _requests("hot"), _requests("handler")
BLOB = (*_blob(), count("failed", "failed"))


def _waited_for() -> float:
    """CPU seconds of this process's children that have ended; during a load that is only wrk."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ask(front: Front, want: Want, lasting: float) -> dict[str, float]:
    """wrk's numbers of a manifest. Raises PartFailed."""
    assert front.part is not None
    fetch(front, want)
    before, ended = settled(front.part), _waited_for()
    done = wrk(front.port, want.path, connections=SMALL_CONNECTIONS, lasting=lasting)
    front.part.check()
    spent, client = cpu_seconds(front.part.pid) - before, _waited_for() - ended
    return {
        "rate": done.requests / done.seconds,
        "economy": done.requests / max(TICK, spent),
        "cores": spent / done.seconds,
        "client_cores": client / done.seconds,
        "failed": done.failed,
    }


def carry(front: Front, want: Want, each: int) -> dict[str, float]:
    """A crowd's numbers of a blob, in bytes. Raises PartFailed."""
    assert front.part is not None
    fetch(front, want)
    before = settled(front.part)
    crowd = (want,) * LARGE_CONNECTIONS
    report = unleash(Plan(LOOPBACK, front.port, crowd, verify=False, each=each))
    front.part.check()
    spent = cpu_seconds(front.part.pid) - before
    wall = max(answer.ended for answer in report.answers)
    return {
        "rate": steady_rate(report.answers),
        "economy": sum(answer.size for answer in report.answers) / max(TICK, spent),
        "cores": spent / wall,
        "client_cores": report.cpu / wall,
        "failed": sum(not answer.is_served for answer in report.answers),
    }


def steady_rate(answers: Sequence[Answer]) -> float:
    """Bytes a second while all clients were there, of the answers that were done by then: two
    workers may have more of the clients and less, and the one with less is done early."""
    ends: dict[int, float] = {}
    for answer in answers:
        ends[answer.client] = max(answer.ended, ends.get(answer.client, 0.0))
    first = min(ends.values())
    return sum(answer.size for answer in answers if answer.ended <= first) / first


def play(
    subject: Subject, directory: Path, upstream: int, wants: tuple[Want, Want], size: Size
) -> Played:
    """The loads on one subject: as it comes, then a new one without the hot path."""
    manifest, blob = wants
    values: dict[str, float] = {"failed": 0}

    def note(name: str, found: dict[str, float]) -> None:
        values["failed"] += found.pop("failed")
        values.update({f"{name}_{key}": value for key, value in found.items()})

    for name in ("hot", "handler"):
        (directory / name).mkdir()
    place = Place(upstream, CAP, directory / "hot", access_log=True)
    with subject.start(place) as front:
        note("hot", ask(front, manifest, size.lasting))
        note("blob", carry(front, blob, size.each))
    place = replace(place, directory=directory / "handler", settings="hot_path = false")
    with subject.start(place) as front:
        note("handler", ask(front, manifest, size.lasting))
        return Played(values, front.configuration)


def measure(options: Options) -> Findings:
    """Loads one worker and two in turn, then kills leaders. Raises PartFailed."""
    size = FAST if options.fast else FULL
    image = make_image("bench/workers", layers=size.layers, layer_size=KIB)
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as name,
        static_registry(Path(name)) as (upstream, shelf),
    ):
        wants = shelf.image(image), shelf.blob("bench/workers", size.blob)
        board = play_in_turn(
            "workers",
            (ONE, TWO),
            options,
            lambda subject, directory: play(subject, directory, upstream.port, wants, size),
        )
    scenes = takeover.play(TWO, options)
    what = f"manifest of {wants[0].size:,} bytes over {SMALL_CONNECTIONS} connections"
    large = f"{size.blob / MIB:g} MiB over {LARGE_CONNECTIONS} connections"
    return Findings(
        about=ABOUT,
        sheets=(
            board.sheet(f"workers: {what}, hot path", HOT, rival=ONE.name),
            board.sheet(f"workers: {what}, aiohttp's handler", HANDLER, rival=ONE.name),
            board.sheet(f"workers: {large}", BLOB, rival=ONE.name),
            *map(takeover.sheet, scenes),
        ),
        promises=(*_promises(board), *chain.from_iterable(map(takeover.promises, scenes))),
        configurations={
            "the upstream": upstream.configuration,
            **board.configurations(),
            **{f"the upstream, cap {each.cap}": each.upstream for each in scenes},
        },
        figures={
            "loads": board.figures(),
            "takeover": {f"cap {each.cap}": each.board.figures() for each in scenes},
        },
        charts=(
            board.chart(
                "workers-rate",
                f"Requests a second through aiohttp's handler, {what}",
                HANDLER[0],
                better="more",
            ),
            board.chart(
                "workers-economy", f"Requests a CPU-second, hot path, {what}", HOT[1], better="more"
            ),
        ),
    )


def _promises(board: Board) -> Iterator[Promise]:
    for key, what in (("hot", "hot path"), ("handler", "aiohttp's handler")):
        words = f"two workers: requests a CPU-second, {what}"
        yield from board.promise(words, f"{key}_economy", "≥", 0.9, rival=ONE.name)
    words = "two workers: rate through aiohttp's handler"
    yield from board.promise(words, "handler_rate", "≥", 1.3, rival=ONE.name)
    yield from board.bound(BLOB[-1], "requests that failed", 0)
