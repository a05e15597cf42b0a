"""A fleet of up to 10,000 nodes in virtual time, on the code that decides in a real one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.charts import Bar, Chart
from benchmarks.fleet_model import AT_ONCE, RATE, Fleet, Layer, Result
from benchmarks.fleet_time import LATENCY, SERVICE
from benchmarks.parts import MIB, TIMES
from benchmarks.scenario import Findings, Options, Promise, Sheet
from proxy.oci.digest import Digest

ABOUT = f"""
Every node has an uplink and a downlink of {RATE // MIB} MiB/s, and the upstream gives {RATE // MIB}
MiB/s in all. Times are those of a node's own pull, from its first question to its last byte, as
multiples of what one node alone takes from that upstream. What decides (`proxy/fleet/pursuit.py`,
`stripes.py`, `local_claims.py`) is what runs in a node; how bytes travel is a model
(`benchmarks/fleet_model.py`): pieces of 256 KiB that occupy an uplink and a downlink. A call of the
directory is {LATENCY * 1000:.0f} ms on its way, and the directory does one after the other:
{SERVICE["take"] * 1e6:.0f} \N{MICRO SIGN}s of its processor for a `take`, which is what one costs a
real server (`fleet_directory`). A rolling update lets a fifth of the nodes begin when those
before have finished.
""".strip()

WAVES = 5
LARGE = 1024 * MIB
#: Of an image with many layers: sizes as uneven as those of real ones are.
SIZES = tuple((3 + 7 * number % 29) * MIB for number in range(30))


@dataclass(frozen=True, slots=True)
class Play:
    """So many nodes, what they pull, how many layers each at a time, and in how many waves."""

    nodes: int
    what: str
    layers: Sequence[Layer]
    at_once: int = AT_ONCE
    waves: int = 1

    @property
    def size(self) -> int:
        return sum(layer.size for layer in self.layers)

    @property
    def name(self) -> str:
        arrival = "all at once" if self.waves == 1 else f"in {self.waves} waves"
        return f"{self.nodes:,} nodes, {self.what}, {arrival}"


@dataclass(frozen=True, slots=True)
class Played:
    """A play and its outcome, as multiples of one node's own pull and of the image's bytes."""

    play: Play
    outcome: Result

    @property
    def ratios(self) -> list[float]:
        alone = self.play.size / RATE
        return [seconds / alone for seconds in self.outcome.seconds]

    @property
    def last(self) -> float:
        return max(self.ratios)

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def upstream(self) -> float:
        return self.outcome.upstream / self.play.size

    @property
    def operations(self) -> float:
        return self.outcome.operations.total() / self.play.nodes

    def row(self) -> tuple[str, ...]:
        return (
            self.play.name,
            f"{self.median:.2f} {TIMES}",
            f"{self.last:.2f} {TIMES}",
            f"{self.upstream:.2f} {TIMES}",
            f"{self.operations:,.0f}",
            f"{self.outcome.busiest_second:,}",
            f"{1000 * self.outcome.longest_wait:,.0f} ms",
        )

    def summary(self) -> dict[str, object]:
        return {
            "play": self.play.name,
            "nodes": self.play.nodes,
            "bytes": self.play.size,
            "median": self.median,
            "last": self.last,
            "upstream": self.upstream,
            "operations": dict(self.outcome.operations),
            "operations_a_node": self.operations,
            "operations_in_the_busiest_second": self.outcome.busiest_second,
            "longest_wait": self.outcome.longest_wait,
            "busy": self.outcome.busy,
        }


def blob(size: int, number: int = 0) -> Layer:
    return Layer(Digest.of(b"%d of %d bytes" % (number, size)), size)


def one_blob(nodes: int, size: int, waves: int = 1) -> Play:
    return Play(nodes, f"one blob of {size // MIB:,} MiB", [blob(size)], waves=waves)


def image(nodes: int, at_once: int = AT_ONCE, waves: int = 1) -> Play:
    layers = [blob(size, number) for number, size in enumerate(SIZES)]
    what = f"{len(SIZES)} layers of {sum(SIZES) // MIB} MiB, {at_once} at a time"
    return Play(nodes, what, layers, at_once, waves)


def plays(*, fast: bool) -> list[Play]:
    if fast:
        small = 32 * MIB
        return [one_blob(6, small), one_blob(16, small), one_blob(10, small, WAVES), image(4)]
    return [
        *(one_blob(nodes, LARGE) for nodes in (6, 16, 48)),
        *(one_blob(nodes, LARGE, WAVES) for nodes in (48,)),
        *(image(nodes) for nodes in (6, 16, 48)),
        image(48, at_once=len(SIZES)),
        image(48, waves=WAVES),
        one_blob(200, 256 * MIB),
        one_blob(1000, 256 * MIB),
        one_blob(1000, 256 * MIB, WAVES),
        one_blob(10_000, 16 * MIB),  # more stripes would keep the directory busy for minutes
    ]


def played(play: Play) -> Played:
    fleet = Fleet(play.nodes, at_once=play.at_once)
    return Played(play, fleet.play(play.layers, play.waves))


def promised(found: Sequence[Played]) -> tuple[Promise, ...]:
    promises = []
    for nodes, most in ((16, 1.3), (48, 1.6)):
        of_these = [one for one in found if one.play.nodes == nodes]
        for one in of_these:
            what = f"{one.play.name}: last node done, of a single node's own pull"
            promises.append(
                Promise(what, f"{TIMES}{most:.2f} at most", f"{one.last:.2f}", one.last <= most)
            )
    most_bytes = max(one.upstream for one in found)
    wanted = "1.00"
    promises.append(
        Promise("upstream bytes", f"{TIMES}{wanted}", f"{most_bytes:.2f}", most_bytes == 1.0)
    )
    return tuple(promises)


def charts(found: Sequence[Played]) -> tuple[Chart, ...]:
    """Completion and load of the directory, for each play."""

    def bars(value: str) -> tuple[Bar, ...]:
        drawn = []
        for one in found:
            number = float(getattr(one, value))
            label = f"{one.play.nodes:,} {TIMES} {len(one.play.layers)}"
            label += " in waves" if one.play.waves > 1 else ""
            label += f", {one.play.at_once} at a time" if one.play.at_once != AT_ONCE else ""
            drawn.append(Bar(label, number, f"{number:,.2f}", number, number, ours=True))
        return tuple(drawn)

    last = "Last node done: nodes \N{MULTIPLICATION SIGN} layers"
    calls = "Calls of the directory: nodes \N{MULTIPLICATION SIGN} layers"
    return (
        Chart("fleet-sim-last", last, "multiples of one node's pull", "less", bars("last")),
        Chart("fleet-sim-calls", calls, "calls for each node", "less", bars("operations")),
    )


def measure(options: Options) -> Findings:
    found = []
    for play in plays(fast=options.fast):
        options.log(play.name)
        found.append(played(play))
    columns = (
        "fleet",
        "median node",
        "last node",
        "upstream bytes",
        "calls of the directory, a node",
        "calls in the busiest second",
        "longest wait for the directory",
    )
    sheet = Sheet("A fleet in virtual time", columns, tuple(one.row() for one in found))
    return Findings(
        about=ABOUT,
        sheets=(sheet,),
        promises=() if options.fast else promised(found),
        figures=[one.summary() for one in found],
        charts=charts(found),
    )
