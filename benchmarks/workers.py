"""Several processes, one cache (`pullpool serve --workers N`): what does the second one bring?

`python -m benchmarks workers` measures pullpool only, with one worker and with two in turn: wrk
asks for a held manifest by digest over 64 connections, answered by the hot path and again, with
that turned off, by aiohttp's handler; and for a large held blob over 8. Then the leader of two
workers is killed while it fills a blob for the other one's client (`takeover.py`).
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from benchmarks import takeover
from benchmarks.board import Board, Measure, Played, count, megabytes, per_second, play_in_turn
from benchmarks.images import make_image
from benchmarks.load import Want
from benchmarks.parts import KIB, MIB, cpu_seconds, settled
from benchmarks.scenario import Findings, Options, Promise
from benchmarks.static import static_registry
from benchmarks.subjects import Front, Place, Subject, pullpool
from benchmarks.warm import fetch
from benchmarks.wrk import wrk

CAP = 16
SMALL_CONNECTIONS, LARGE_CONNECTIONS = 64, 8

ABOUT = """\
pullpool alone, with one worker and with two in turn, access logs on. wrk asks for a held manifest
by digest over 64 connections, always in the same bytes: once of the hot path, once (`hot_path =
false`) of aiohttp's handler; and for a large held blob over 8. CPU is that of all processes of the
service: the supervisor, the workers, and those that have ended. wrk has one thread, makes its
request once and runs no script while it asks, but it shares the two cores; *cores* and *wrk's
cores* say how many the service and wrk kept busy. Through the handler wrk takes little of them, and
the second worker shows in the rate. The hot path and the blob keep wrk so busy that together with
one worker it fills both cores: what a second worker could do is not to be had there, and only what
a CPU-second does compares.

*Takeover*: a client pulls a cold blob through the worker that follows, from the bundled registry,
slowly: over one connection, in order, and over eight. Once the registry has sent a quarter of it
the worker that leads is killed (SIGKILL). From that moment are counted: *leads*, until the other
one does (by its log); *goes on*, until the client has a byte that the dead one had not passed on;
*whole*, until the replacement serves. The client hashes what it gets; the registry counts the bytes
that it sends and the requests beyond its limit, which is the cap.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Layers that the manifest names, bytes of the blob, and seconds of each load."""

    layers: int
    blob: int
    lasting: float


FULL, FAST = Size(8, 64 * MIB, 4.0), Size(8, 2 * MIB, 1.0)


def two_workers(place: Place) -> AbstractContextManager[Front]:
    return pullpool(replace(place, settings=f"workers = 2\n{place.settings}"))


ONE = Subject("one", "pullpool, one worker", "", pullpool)
TWO = Subject("pullpool", "pullpool, two workers", "", two_workers)


def _beside_cores(rate: Measure, economy: Measure, key: str) -> Sequence[Measure]:
    cores = Measure(f"{key}_cores", "cores", "", ratio=False)
    return rate, economy, cores, Measure(f"{key}_wrk_cores", "wrk's cores", "", ratio=False)


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


def load(
    front: Front, want: Want, connections: int, lasting: float, *, each: int = 1
) -> dict[str, float]:
    """One load's numbers; rate and economy in requests, each of which counts `each`.

    Raises PartFailed.
    """
    assert front.part is not None
    fetch(front, want)
    before, ended = settled(front.part), _waited_for()
    done = wrk(front.port, want.path, connections=connections, lasting=lasting)
    front.part.check()
    spent, spent_by_wrk = cpu_seconds(front.part.pid) - before, _waited_for() - ended
    return {
        "rate": each * done.requests / done.seconds,
        "economy": each * done.requests / spent,
        "cores": spent / done.seconds,
        "wrk_cores": spent_by_wrk / done.seconds,
        "failed": done.failed,
    }


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
        note("hot", load(front, manifest, SMALL_CONNECTIONS, size.lasting))
        note("blob", load(front, blob, LARGE_CONNECTIONS, size.lasting, each=blob.size))
    place = replace(place, directory=directory / "handler", settings="hot_path = false")
    with subject.start(place) as front:
        note("handler", load(front, manifest, SMALL_CONNECTIONS, size.lasting))
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
