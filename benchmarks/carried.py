"""A blob ten times the cache's limit goes through pullpool: is it served, and is memory flat?

A part of the scenario `memory`. The bundled registry makes the bytes as it sends them, so that
neither it nor a disk has to hold them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.load import Plan
from benchmarks.parts import LOOPBACK, MIB, Background, resident_bytes
from benchmarks.patterns import pattern_registry
from benchmarks.rounds import unleash
from benchmarks.scenario import Options, Promise, Sheet
from benchmarks.subjects import PULLPOOL, Place, pullpool

CAP = 8
GIB = 1024 * MIB
#: How much more memory the later part may take than the first tenth and still count as flat.
FLAT = 48 * MIB
LOOK = 0.2  # seconds between two looks


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of the blob and of the cache, and the latter as its setting has it."""

    blob: int
    limit: str


FULL, FAST = Size(20 * GIB, "2GiB"), Size(64 * MIB, "8MiB")


@dataclass(frozen=True, slots=True)
class Carried:
    """What came, in so many seconds, and RSS over the time, all in bytes."""

    size: Size
    came: int
    is_served: bool
    seconds: float
    resident: tuple[int, ...]

    @property
    def early(self) -> int:
        """The most of the first tenth."""
        return max(self.resident[: max(1, len(self.resident) // 10)])

    @property
    def most(self) -> int:
        return max(self.resident)

    def figures(self) -> Mapping[str, object]:
        return {
            "came": self.came,
            "served": self.is_served,
            "seconds": self.seconds,
            "early": self.early,
            "most": self.most,
        }


@dataclass(slots=True)
class Watch(Background):
    """Looks at the memory of a process in a thread of its own while its block lasts."""

    pid: int
    seen: list[int] = field(default_factory=list)

    def _work(self) -> None:
        self.seen.append(resident_bytes(self.pid))
        while not self._end.wait(LOOK):
            self.seen.append(resident_bytes(self.pid))


def play(options: Options) -> Carried | None:
    """Carries it once; None when pullpool is not to be measured. Raises PartFailed."""
    if options.only and PULLPOOL.name not in options.only:
        return None
    size = FAST if options.fast else FULL
    options.log(f"memory: {size.blob / MIB:,g} MiB through a cache of {size.limit}")
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        (Path(name) / "front").mkdir()
        with (
            pattern_registry(Path(name), size=size.blob, number=1) as (port, (want,)),
            pullpool(Place(port, CAP, Path(name) / "front", cache_size=size.limit)) as front,
        ):
            assert front.part is not None
            with Watch(front.part.pid) as watch:
                plan = Plan(LOOPBACK, front.port, (want,), options.fast, patience=1800)
                (answer,) = unleash(plan).answers
            front.part.check()
    whole = answer.is_served and answer.size == size.blob
    return Carried(size, answer.size, whole, answer.ended - answer.began, tuple(watch.seen))


def sheets(carried: Carried | None) -> Iterator[Sheet]:
    """One row, or nothing."""
    if carried is not None:
        yield Sheet(
            f"memory: a blob of {carried.size.blob / MIB:,g} MiB through a cache of"
            f" {carried.size.limit}",
            ("in front", "served", "done", "rate", "RSS, first tenth", "RSS, most"),
            (
                (
                    PULLPOOL.title,
                    "yes" if carried.is_served else f"{carried.came:,} bytes",
                    f"{carried.seconds:.1f} s",
                    f"{carried.came / carried.seconds / 1e6:.0f} MB/s",
                    f"{carried.early / MIB:.0f} MiB",
                    f"{carried.most / MIB:.0f} MiB",
                ),
            ),
        )


def promises(carried: Carried | None) -> Iterator[Promise]:
    """It is served whole, and takes no more memory the longer it lasts."""
    if carried is not None:
        served = "yes" if carried.is_served else "no"
        yield Promise("a blob larger than the cache is served", "yes", served, carried.is_served)
        more = carried.most - carried.early
        yield Promise(
            "and its memory is flat",
            f"≤ {FLAT / MIB:.0f} MiB more",
            f"{more / MIB:.0f} MiB",
            more <= FLAT,
        )
