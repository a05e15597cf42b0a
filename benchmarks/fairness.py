"""Fifty clients that want little, alone and beside one that wants very much.

`python -m benchmarks fairness` starts every part itself and prints a table. Fifty clients each pull
a cold image with a layer of 1 MiB through pullpool, from the bundled registry that allows 8 sockets
and gives each 8 MiB a second, which two cores can carry; then again, beside one client that has
asked for 500 blobs of 64 MiB at once and holds every slot by then. What counts is how much longer
the fifty take: at most one turn, which is about 2 s.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import uvloop

from benchmarks.load import Answer, Plan, Want, crowd
from benchmarks.parts import (
    LOOPBACK,
    MIB,
    TIMES,
    prime_pages,
    request,
    running,
    until,
)
from benchmarks.scenario import Findings, Options, Promise, Sheet
from benchmarks.subjects import Place, pullpool
from benchmarks.wire import Received, Wire
from proxy.upstream.origin import TURN_SECONDS

CAP = 8
HEAVY = "127.9.0.1"  # the address of the client that wants much
ROUNDS = 2

ABOUT = """\
Fifty clients each pull a cold image with a layer of 1 MiB through pullpool, from the bundled
registry that allows 8 sockets and gives each 8 MiB a second; then again, beside one client that has
asked for 500 blobs of 64 MiB at once and holds every slot by then. Turns are bounded and rotate
over the clients (DESIGN D2, D3), so the fifty should be one turn later at most, whatever the other
wants.
"""


@dataclass(frozen=True, slots=True)
class Size:
    """Clients with little and their layer; blobs of the client with much; bytes a second of each
    connection; seconds that the latter is ahead. `whole`: wait for all it wants, and check it."""

    clients: int
    layer_size: int
    blobs: int
    blob_size: int
    rate: int
    ahead: float
    whole: bool = False

    @property
    def turn(self) -> float:
        """Seconds that a turn of the client with much lasts."""
        return min(TURN_SECONDS, self.blob_size / self.rate)

    def title(self) -> str:
        return (
            f"fairness: {self.clients} clients with {self.layer_size / MIB:g} MiB each, alone and"
            f" beside one with {self.blobs} {TIMES} {self.blob_size / MIB:g} MiB; cap {CAP},"
            f" {self.rate / MIB:g} MiB/s for each connection"
        )


FULL = Size(50, MIB, 500, 64 * MIB, rate=8 * MIB, ahead=12.0)
FAST = Size(10, MIB // 8, 24, MIB, rate=4 * MIB, ahead=0.2, whole=True)


@dataclass(frozen=True, slots=True)
class Registry:
    """The bundled registry in a process of its own: what there is to pull."""

    port: int
    control: int
    images: tuple[Want, ...]
    blobs: tuple[Want, ...]

    def peak_sockets(self) -> int:
        return int(json.loads(request(self.control, "/_counters").body)["peak_sockets"])


def command(size: Size) -> tuple[str, ...]:
    """How the bundled registry is started, after the interpreter."""
    return (
        *("-m", "proxy.testing", "registry", f"--limit={CAP}"),
        *(f"--rate={size.rate}", f"--images={size.clients}", "--layers=1"),
        *(f"--layer-size={size.layer_size}", f"--patterns={size.blobs}"),
        f"--pattern-size={size.blob_size}",
    )


@contextlib.contextmanager
def registry(directory: Path, size: Size) -> Iterator[Registry]:
    """Starts it with its blobs. Raises PartFailed."""
    with running("registry", (sys.executable, *command(size)), directory) as part:

        def has_spoken() -> bool:
            part.check()
            return "\n" in part.output.read_text()

        until(has_spoken, "the bundled registry")
        ready = json.loads(part.output.read_text().splitlines()[0])
        port, control = (urlsplit(ready[name]).port for name in ("url", "control"))
        assert port is not None
        assert control is not None
        images = tuple(_image(one) for one in ready["images"])
        name, digests = ready["patterns"]["name"], ready["patterns"]["digests"]
        blobs = tuple(Want("blob", name, one, one, size.blob_size) for one in digests)
        yield Registry(port, control, images, blobs)


def _image(image: Mapping[str, Any]) -> Want:
    return Want("manifest", image["name"], image["tag"], image["digest"], image["size"])


@dataclass(frozen=True, slots=True)
class Round:
    """What the clients with little saw; times in seconds, sizes in bytes."""

    name: str
    answers: tuple[Answer, ...]
    expected: int
    heavy_bytes: int
    heavy_served: int
    peak_sockets: int

    @property
    def served(self) -> int:
        return sum(answer.is_served for answer in self.answers)

    @property
    def pulls(self) -> list[float]:
        """When each client had its image, in order."""
        ends: dict[int, float] = {}
        for answer in self.answers:
            ends[answer.client] = max(answer.ended, ends.get(answer.client, 0.0))
        return sorted(ends.values())

    def at(self, share: float) -> float:
        return self.pulls[min(len(self.pulls) - 1, int(len(self.pulls) * share))]

    def figures(self) -> Mapping[str, object]:
        """The round as it goes into the JSON file."""
        return {
            "name": self.name,
            "served": self.served,
            "expected": self.expected,
            "p50": self.at(0.5),
            "p95": self.at(0.95),
            "max": self.pulls[-1],
            "heavy_bytes": self.heavy_bytes,
            "heavy_served": self.heavy_served,
            "peak_sockets": self.peak_sockets,
        }


class Heavy:
    """The client that wants much: all of it at once, each on a connection of its own."""

    def __init__(self, port: int, wants: Sequence[Want], *, verify: bool) -> None:
        self._port = port
        self._received = [Received(hashed=verify, kept=False) for _ in wants]
        self._wants = wants
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        pairs = zip(self._wants, self._received, strict=True)
        self._tasks = [asyncio.create_task(self._get(*pair)) for pair in pairs]

    async def _get(self, want: Want, received: Received) -> None:
        wire = await Wire.dial(LOOPBACK, self._port, HEAVY)
        try:
            await wire.get(want.path, f"{LOOPBACK}:{self._port}", received)
        finally:
            wire.close()

    async def end(self, *, whole: bool) -> None:
        """Wait for all of it, or leave."""
        if not whole:
            for task in self._tasks:
                task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def count(self) -> int:
        """Body bytes so far."""
        return sum(received.count for received in self._received)

    @property
    def served(self) -> int:
        pairs = zip(self._wants, self._received, strict=True)
        return sum(
            received.status == 200 and received.count == want.size for want, received in pairs
        )


async def pull(port: int, upstream: Registry, size: Size, heavy: Heavy | None) -> Sequence[Answer]:
    """The fifty, once the other has been at it for a while."""
    if heavy is not None:
        heavy.start()
        await asyncio.sleep(size.ahead)
    report = await crowd(Plan(LOOPBACK, port, upstream.images, verify=True))
    if heavy is not None:
        await heavy.end(whole=size.whole)
    return report.answers


def play(name: str, upstream: Registry, size: Size, directory: Path) -> Round:
    """One round from cold. Raises PartFailed."""
    with (
        tempfile.TemporaryDirectory(prefix=f"{name}-", dir=directory) as own,
        pullpool(Place(upstream.port, CAP, Path(own))) as front,
    ):
        request(upstream.control, "/_reset", method="POST")
        heavy = None
        if name == "beside":
            heavy = Heavy(front.port, upstream.blobs, verify=size.whole)
        answers = uvloop.run(pull(front.port, upstream, size, heavy))
        if front.part is not None:
            front.part.check()
        return Round(
            name=name,
            answers=tuple(answers),
            expected=3 * size.clients,  # manifest, config, layer
            heavy_bytes=0 if heavy is None else heavy.count,
            heavy_served=0 if heavy is None else heavy.served,
            peak_sockets=upstream.peak_sockets(),
        )


def run(size: Size, *, rounds: int, log: Callable[[str], None]) -> list[Round]:
    """Alone and beside, in turn. Raises PartFailed."""
    played = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        registry(Path(name), size) as upstream,
    ):
        for number in range(rounds):
            for kind in ("alone", "beside"):
                log(f"fairness {number + 1}/{rounds}: {kind}")
                if not size.whole:
                    prime_pages(Path(name))
                played.append(play(kind, upstream, size, Path(name)))
    return sorted(played, key=lambda one: one.name)


def fairness_sheet(size: Size, rounds: Sequence[Round]) -> Sheet:
    """One row for each round."""
    rows = [
        (
            played.name,
            f"{played.served} of {played.expected}",
            *(f"{seconds:.2f} s" for seconds in (played.at(0.5), played.at(0.95), played.at(1))),
            f"{played.heavy_bytes / MIB:.0f} MiB",
            str(played.peak_sockets),
        )
        for played in rounds
    ]
    columns = ("answers served", "p50", "p95", "last", "the other got", "peak sockets")
    caption = f"a turn of the client with much lasts {size.turn:.1f} s"
    return Sheet(size.title(), ("the clients with little", *columns), tuple(rows), caption)


def _promises(size: Size, rounds: Sequence[Round]) -> Iterator[Promise]:
    """What DESIGN D2 and D3 promise of it; medians for times, the worst round for counts."""
    missing = sum(one.expected - one.served for one in rounds)
    yield Promise("answers that failed", "0", str(missing), missing == 0)
    peak = max(one.peak_sockets for one in rounds)
    yield Promise("stay within the cap", f"{CAP} sockets", str(peak), peak <= CAP)
    p95 = {
        kind: median(one.at(0.95) for one in rounds if one.name == kind)
        for kind in ("alone", "beside")
    }
    late = p95["beside"] - p95["alone"]
    wanted = f"≤ {size.turn:.1f} s, one turn"
    yield Promise("p95 beside, later than alone by", wanted, f"{late:.2f} s", late <= size.turn)


def measure(options: Options) -> Findings:
    """Alone and beside, in turn. Raises PartFailed."""
    size = FAST if options.fast else FULL
    number = 1 if options.fast else options.rounds or ROUNDS
    played = run(size, rounds=number, log=options.log)
    return Findings(
        about=ABOUT,
        sheets=(fairness_sheet(size, played),),
        promises=tuple(_promises(size, played)),
        configurations={"the bundled registry": " ".join(command(size))},
        figures=[one.figures() for one in played],
    )


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["fairness", *sys.argv[1:]])
