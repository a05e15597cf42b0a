"""A fleet from cold: when is its last node done, and what does the upstream give for that?

`python -m benchmarks fleet` needs root, and Debian's redis-server and iproute2. Every node has a
network namespace and a line of its own (see `benchmarks.nets`); the upstream's carries as much as
one node's, so a node that pulls alone is as quick as it can be. Beside the fleet: *a star*, where
all nodes have the first one for their upstream, and nodes *on their own*.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.charts import Bar, Chart
from benchmarks.load import Report
from benchmarks.nets import Network, network
from benchmarks.nodes import (
    PORT,
    Client,
    Line,
    Registry,
    clients,
    nodes,
    operations,
    redis,
    registry,
)
from benchmarks.parts import MIB, TIMES, PartFailed
from benchmarks.scenario import Findings, Options, Promise, Sheet

CAP = 4  # sockets to the upstream, of all nodes together

ABOUT = """\
Every node runs in a network namespace with a line of its own, shaped in both directions; so does
the upstream, whose line carries as much as one node's. The more nodes, the less each line carries,
or the machine's processors would be what is measured. Everybody pulls the same cold image at once;
each client hashes what it gets. *Alone*: one node pulls, the measure of the others. *Fleet*: the
nodes share a directory. *Star*: all nodes have the first one for their upstream. *Own*: they know
nothing of one another. *Rolling*: a fifth of the nodes at a time. *Killed*: the node that takes the
image from the upstream is killed when half of it is there.
"""


@dataclass(frozen=True, slots=True)
class Shape:
    """An image: how many layers of how many bytes."""

    name: str
    layers: int
    layer: int


def one_and_many(size: int) -> tuple[Shape, Shape]:
    """Images of so many bytes."""
    return Shape("one layer", 1, size), Shape("many layers", 12, size // 12)


@dataclass(frozen=True, slots=True)
class Scale:
    """How many nodes, what each line carries in bytes a second, and what is pulled."""

    nodes: int
    rate: int
    most: float  # times alone that the last node may take
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Size:
    scales: tuple[Scale, ...]
    beside: int  # the scale at which the star and nodes on their own are played


# All nodes together keep one machine's two cores busy with 40 to 60 MB/s. What a pull takes beside
# its bytes (calls, connections, windows that grow) does not shrink with the lines: an image takes
# a minute where there are many.
FULL = Size(
    (
        Scale(6, 8_000_000, 1.3, one_and_many(96 * MIB)),
        Scale(16, 2_500_000, 1.3, one_and_many(192 * MIB)),
        Scale(48, 1_000_000, 1.6, one_and_many(96 * MIB)),
    ),
    6,
)
FAST = Size((Scale(3, 8_000_000, 9.0, (Shape("two layers", 2, 2 * MIB),)),), 3)


@dataclass(frozen=True, slots=True)
class Pull:
    """One play. Seconds; `done` of each node whose client was served, `failed` pulls of nodes that
    were not killed, bytes and the most sockets of the upstream, directory operations."""

    kind: str
    scale: Scale
    shape: Shape
    alone: float
    done: tuple[float, ...]
    failed: int
    upstream: int
    unique: int
    peak: int
    operations: int

    @property
    def last(self) -> float:
        return max(self.done, default=float("nan"))

    @property
    def later(self) -> float:
        return self.last / self.alone

    @property
    def times_bytes(self) -> float:
        return self.upstream / self.unique

    def figures(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "nodes": self.scale.nodes,
            "rate": self.scale.rate,
            "image": self.shape.name,
            "alone": self.alone,
            "last": self.last,
            "median": statistics.median(self.done) if self.done else None,
            "failed": self.failed,
            "upstream_bytes": self.upstream,
            "unique_bytes": self.unique,
            "peak_sockets": self.peak,
            "directory_operations": self.operations,
        }


Conduct = Callable[[Sequence[Client]], None]


def at_once(everybody: Sequence[Client]) -> None:
    """All of them go."""
    for client in everybody:
        client.go()


def rolling(everybody: Sequence[Client]) -> None:
    """A fifth at a time, the next when the one before is done."""
    wave = max(1, len(everybody) // 5)
    for start in range(0, len(everybody), wave):
        going = everybody[start : start + wave]
        at_once(going)
        for client in going:
            client.wait()


def killing(seconds: float) -> Conduct:
    """All go; after so many seconds the node that has most of it from the upstream is killed. Not
    the one with most sockets: others may have an idle one of the manifest each."""

    def conduct(everybody: Sequence[Client]) -> None:
        at_once(everybody)
        time.sleep(seconds)
        max((client.node for client in everybody), key=lambda node: node.of_upstream).kill()

    return conduct


@dataclass(frozen=True, slots=True)
class World:
    """One network with its upstream, for plays one after the other."""

    network: Network
    upstream: Registry
    directory: Path
    scale: Scale
    shape: Shape

    def lines(self, count: int, **known: str) -> list[Line]:
        first = Line(self.scale.rate, CAP, self.upstream.url, known.get("directory", ""))
        if "star" in known:
            rest = Line(self.scale.rate, CAP, known["star"])
            return [first, *(rest for _ in range(count - 1))]
        return [first] * count

    def play(
        self,
        kind: str,
        count: int,
        *,
        alone: float | None = None,
        conduct: Conduct = at_once,
    ) -> Pull:
        """One play, everything cold. Raises PartFailed."""
        with contextlib.ExitStack() as stack:
            own = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.directory)))
            nets = [self.network.join(self.scale.rate) for _ in range(count)]
            known: dict[str, str] = {}
            store = None
            if kind not in ("alone", "own", "star"):
                store = stack.enter_context(redis(self.network, own))
                known["directory"] = f"redis://{store.address}:6379/0"
            if kind == "star":
                known["star"] = f"http://{nets[0].address}:{PORT}"
            others = [self.upstream.net, *([store] if store is not None else [])]
            self.network.introduce([*nets, *others])
            found = stack.enter_context(nodes(nets, self.lines(count, **known), own))
            everybody = stack.enter_context(clients(found, self.upstream.want))
            if store is not None:
                found[0].wake(self.upstream.other)
            before = operations(store) if store is not None else 0
            self.upstream.begin()
            began = time.monotonic()
            conduct(everybody)
            reports = [(client, client.wait()) for client in everybody]
            counted = self.upstream.counted()
            spent = operations(store) - before if store is not None else 0
        done = [
            client.began - began + max(answer.ended for answer in report.answers)
            for client, report in reports
            if _is_served(report)
        ]
        failed = sum(not _is_served(r) and not c.node.killed for c, r in reports)
        return Pull(
            kind,
            self.scale,
            self.shape,
            alone or max(done, default=float("nan")),
            tuple(done),
            failed,
            counted["bytes_sent"],
            self.upstream.size,
            counted["peak_sockets"],
            spent,
        )


def _is_served(report: Report) -> bool:
    return bool(report.answers) and all(answer.is_served for answer in report.answers)


@contextlib.contextmanager
def world(scale: Scale, shape: Shape) -> Iterator[World]:
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name,
        network() as made,
        registry(
            made.join(scale.rate),
            Path(name),
            layers=shape.layers,
            layer_size=shape.layer,
            limit=CAP,
        ) as upstream,
    ):
        yield World(made, upstream, Path(name), scale, shape)


def measure(options: Options) -> Findings:
    """Plays every scale with every shape. Raises PartFailed."""
    size = FAST if options.fast else FULL
    pulls: list[Pull] = []
    for scale in size.scales:
        for shape in scale.shapes:
            with world(scale, shape) as made:
                for pull in _plays(made, size, options):
                    text = f"{pull.last:.1f} s = {pull.later:.2f} {TIMES} alone"
                    options.log(f"{scale.nodes} nodes, {shape.name}, {pull.kind}: {text}")
                    pulls.append(pull)
    return Findings(
        about=ABOUT,
        sheets=tuple(_sheets(pulls)),
        promises=tuple(_promises(pulls)),
        figures=[pull.figures() for pull in pulls],
        charts=tuple(_charts(pulls)),
    )


def _plays(made: World, size: Size, options: Options) -> Iterator[Pull]:
    count = made.scale.nodes
    alone = made.play("alone", 1)
    if len(alone.done) != 1:
        raise PartFailed("a node alone did not get the image")
    yield alone
    for _ in range(1 if options.fast else options.rounds or 1):
        yield made.play("fleet", count, alone=alone.last)
    if count == size.beside and made.shape == made.scale.shapes[0]:
        yield made.play("star", count, alone=alone.last)
        yield made.play("own", count, alone=alone.last)
        yield made.play("rolling", count, alone=alone.last, conduct=rolling)
        half = killing(alone.last / 2)
        yield made.play("killed", count, alone=alone.last, conduct=half)


def _sheets(pulls: Sequence[Pull]) -> Iterator[Sheet]:
    columns = (
        "play",
        "nodes",
        "image",
        "last node",
        f"{TIMES} alone",
        "failed",
        "upstream / unique bytes",
        "peak sockets",
        "directory operations a node",
    )
    rows = tuple(
        (
            pull.kind,
            str(1 if pull.kind == "alone" else pull.scale.nodes),
            pull.shape.name,
            f"{pull.last:.1f} s",
            f"{pull.later:.2f} {TIMES}",
            str(pull.failed),
            f"{pull.times_bytes:.2f}",
            str(pull.peak),
            f"{pull.operations / pull.scale.nodes:.0f}" if pull.operations else "-",
        )
        for pull in pulls
    )
    yield Sheet("fleet: everything cold", columns, rows)


def _promises(pulls: Sequence[Pull]) -> Iterator[Promise]:
    for pull in pulls:
        what = f"{pull.kind}, {pull.scale.nodes} nodes, {pull.shape.name}"
        if pull.kind not in ("fleet", "rolling", "killed"):
            continue
        yield Promise(f"{what}: failed pulls", "0", str(pull.failed), pull.failed == 0)
        most = 1.15 if pull.kind == "killed" else 1.005
        ratio = pull.times_bytes
        wanted = f"≤ {most:.2f}" if pull.kind == "killed" else "1.00"
        yield Promise(f"{what}: upstream bytes", wanted, f"{ratio:.2f}", ratio <= most)
        yield Promise(f"{what}: sockets", f"≤ {CAP}", str(pull.peak), pull.peak <= CAP)
        if pull.kind == "fleet":
            text = f"{pull.later:.2f} {TIMES}"
            limit = pull.scale.most
            yield Promise(f"{what}: last node", f"≤ {limit} {TIMES}", text, pull.later <= limit)


def _charts(pulls: Sequence[Pull]) -> Iterator[Chart]:
    for shape in dict.fromkeys(pull.shape.name for pull in pulls):
        bars = [
            Bar(
                f"{pull.kind}, {pull.scale.nodes} nodes",
                pull.later,
                f"{pull.later:.2f} {TIMES}",
                pull.later,
                pull.later,
                pull.kind not in ("star", "own"),
            )
            for pull in pulls
            if pull.shape.name == shape and pull.kind != "alone"
        ]
        name = f"fleet-{shape.replace(' ', '-')}"
        yield Chart(name, f"Last node done, {shape}", f"{TIMES} a node alone", "less", tuple(bars))
