"""Nodes, their links and an upstream in virtual time, for decisions that are the real ones.

What decides is `proxy.fleet.pursuit` and `LocalClaims`; what is modelled is only how bytes travel.
Every node has an uplink and a downlink of the same rate, the upstream one uplink of that rate.
Bytes move in pieces of 256 KiB: a piece occupies the giver's uplink and the taker's downlink for as
long as it takes, a giver serves its takers in turn, and who is still receiving a stripe passes on
the pieces it has. A call of the directory is `LATENCY` on its way and occupies the directory for
a while (`fleet_time.py`); those that come meanwhile wait in turn. A node makes one after the other
for each blob.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from benchmarks.fleet_time import LATENCY, Directory, Time
from proxy.fleet.board import Board
from proxy.fleet.claims import WHOLE, Giver, Grant, Outcome, Taken, Terms, View
from proxy.fleet.crowd import FEW, before_first
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.pursuit import Pursuit
from proxy.fleet.shunned import Shunned
from proxy.fleet.steps import Ask, Fresh, Step
from proxy.fleet.stripes import PIECE, lowest_zero, stripe_length
from proxy.fleet.traffic import Traffic
from proxy.oci.digest import Digest

T = TypeVar("T")
RATE = 100 << 20  # bytes a second of every link
AT_ONCE = 3  # layers that a node pulls at the same time, as containerd does


@dataclass(slots=True, eq=False)
class Transfer:
    """Pieces of one stripe (or span) on their way to a node's pull."""

    source: Sender
    pull: Pull
    stripe: int
    pieces: int
    sent: int = 0
    is_over: bool = False


class Sender:
    """An uplink; `has` says how many pieces of a stripe there are to send."""

    def __init__(self, time: Time, piece_time: float) -> None:
        self._time = time
        self._piece_time = piece_time
        self._is_busy = False
        self.transfers: deque[Transfer] = deque()
        self.sent = 0

    def has(self, _transfer: Transfer) -> int:
        """The upstream has all."""
        return 1 << 60

    def add(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)
        self.kick()

    def kick(self) -> None:
        """Send the next piece, if the link is free and somebody can take one."""
        if self._is_busy:
            return
        for place, transfer in enumerate(self.transfers, 1):
            node = transfer.pull.node
            if not node.is_receiving and transfer.sent < self.has(transfer):
                self.transfers.rotate(-place)
                self._is_busy = node.is_receiving = True
                self._time.after(self._piece_time, self._arrived, transfer)
                return

    def _arrived(self, transfer: Transfer) -> None:
        self._is_busy = False
        self.sent += 1
        node = transfer.pull.node
        node.is_receiving = False
        transfer.sent += 1
        if transfer.sent == transfer.pieces:
            self.transfers.remove(transfer)
        transfer.pull.arrived(transfer)
        node.let_others_send(self)
        self.kick()


@dataclass(frozen=True, slots=True)
class Layer:
    digest: Digest
    size: int


class Node(Sender):
    """A node of the fleet: its links, what it shuns and the layers it pulls, in their order."""

    def __init__(self, fleet: Fleet, number: int) -> None:
        super().__init__(fleet.time, fleet.piece_time)
        self.fleet = fleet
        name = f"{number:016x}"
        self.giver = Giver(name, f"node-{number}", f"zone-{number % fleet.zones}", f"http://{name}")
        self.claims = LocalClaims(fleet.board, self.giver)
        self.shunned = Shunned()
        self.traffic = Traffic()
        self.is_receiving = False
        self.pulls: dict[Digest, Pull] = {}
        self.began = 0.0
        self.done: float | None = None
        self._todo: deque[Layer] = deque()

    def has(self, transfer: Transfer) -> int:
        pull = self.pulls[transfer.pull.layer.digest]
        stripe = transfer.stripe
        return transfer.pieces if pull.pursuit.have >> stripe & 1 else pull.progress.get(stripe, 0)

    def let_others_send(self, last: Sender) -> None:
        """The downlink is free: givers that waited for it, before the one that had it."""
        for pull in self.pulls.values():
            for transfer in tuple(pull.transfers.values()):
                if transfer.source is not last:
                    transfer.source.kick()
                    if self.is_receiving:
                        return

    def begin(self, layers: Sequence[Layer]) -> None:
        self.began = self._time.now
        self._todo = deque(layers)
        for _ in range(self.fleet.at_once):
            self.next_layer()

    def next_layer(self) -> None:
        if self._todo:
            layer = self._todo.popleft()
            pull = self.pulls[layer.digest] = Pull(self, layer)
            self._time.after(self.fleet.first_pause(), pull.act)
        elif self.done is None and all(pull.is_done for pull in self.pulls.values()):
            self.done = self._time.now
            self.fleet.finished(self)


class Pull:
    """A node's way to one layer: does what the pursuit says."""

    def __init__(self, node: Node, layer: Layer) -> None:
        self.node, self.layer = node, layer
        # The manifest, which every node has by then, tells the size.
        self.pursuit = Pursuit(
            node.giver,
            shunned=node.shunned,
            rng=node.fleet.rng,
            size=layer.size,
            traffic=node.traffic,
        )
        self.progress: dict[int, int] = {}
        self.transfers: dict[object, Transfer] = {}
        self.is_done = False
        self._is_acting = self._is_to_act = False
        self._looks = 0
        self._ended: list[tuple[Grant, Outcome]] = []

    def __repr__(self) -> str:
        return f"<Pull of {self.node.giver.name}: {self.pursuit!r}>"

    def act(self) -> None:
        """One step: the directory's calls one after the other, then what they allow."""
        if self.is_done:
            return
        if self._is_acting:
            self._is_to_act = True
            return
        self._is_acting = True
        self._step()

    def _ask(self, name: str, call: Coroutine[Any, Any, T], then: Callable[[T], None]) -> None:
        time, began = self.node.fleet.time, self.node.fleet.time.now

        def answered(answer: T) -> None:
            self.pursuit.answered(time.now - began, time.now)
            then(answer)

        self.node.fleet.directory.ask(name, call, answered)

    def _step(self) -> None:
        fleet, pursuit, claims = self.node.fleet, self.pursuit, self.node.claims
        digest, size = self.layer.digest, self.layer.size
        if not pursuit.generation:
            self._ask("look", claims.look(digest), self._saw)
            return
        step = pursuit.step(lowest_zero(pursuit.have), fleet.time.now)
        if step.fill:
            pursuit.begun(step.fill)
            self._fill(step.fill.first, step.fill.last)
        if step.lead:
            self._ask("fill", claims.fill(digest, size), self._led)
        elif step.publish:
            self._publish(step.publish, self._step)
        elif pursuit.is_complete:
            self._complete()
        elif step.wishes or (self._ended and not step.saves):
            self._take(step)
        else:
            self._rest(step.wait)

    def _saw(self, view: View) -> None:
        self.pursuit.saw(view)
        self._step()

    def _led(self, filler: str | None) -> None:
        self.pursuit.led(filler)
        self._step()

    def _publish(self, fresh: Fresh, then: Callable[[], None]) -> None:
        args = (self.layer.digest, self.layer.size, fresh.first, fresh.hashes, fresh.by)

        def published(count: int | None) -> None:
            self.pursuit.was_published(fresh, count)
            then()

        self._ask("publish", self.node.claims.publish(*args), published)

    def _take(self, step: Step) -> None:
        wanted = (step.wishes, step.room, self.pursuit.published, step.avoid)
        ended, self._ended = self._ended, []
        call = self.node.claims.take(self.layer.digest, *wanted, ended)

        def took(taken: Taken) -> None:
            if step.wishes:
                self.pursuit.took(taken)
            else:
                self.pursuit.saw(taken.view)
            for grant in taken.grants:
                self.node.fleet.time.after(LATENCY, self._receive, grant)
            self._rest(step.wait)

        self._ask("take", call, took)

    def _rest(self, wait: float) -> None:
        """Until something happens, or for so long."""
        self._is_acting = False
        if self._is_to_act:
            self._is_to_act = False
            self.act()
            return
        self._looks += 1
        self.node.fleet.time.after(wait, self._look, self._looks)

    def _look(self, number: int) -> None:
        """Nothing has happened since: see whether there is news."""
        if self.is_done or self._looks != number or self._is_acting:
            return
        if not self.pursuit.is_to_look(lowest_zero(self.pursuit.have), self.node.fleet.time.now):
            self.act()
            return
        self._is_acting = True
        call = self.node.claims.look(self.layer.digest, self.pursuit.published)
        self._ask("look", call, self._saw)

    def _fill(self, first: int, last: int) -> None:
        size = self.layer.size
        pieces = sum(-(-stripe_length(size, s) // PIECE) for s in range(first, last))
        transfer = Transfer(self.node.fleet.upstream, self, first, pieces)
        self.transfers["fill"] = transfer
        transfer.source.add(transfer)

    def _receive(self, grant: Grant | Ask) -> None:
        giver = self.node.fleet.nodes[grant.giver.node]
        pull = giver.pulls[self.layer.digest]
        if not pull.pursuit.may_pass_on(grant.stripe, grant.rank):
            raise AssertionError(f"{giver.giver.name} was granted but cannot give")
        pieces = -(-stripe_length(self.layer.size, grant.stripe) // PIECE)
        transfer = Transfer(giver, self, grant.stripe, pieces)
        self.transfers[grant.stripe] = transfer
        giver.add(transfer)

    def arrived(self, transfer: Transfer) -> None:
        """A piece has."""
        if self.transfers.get("fill") is transfer:
            self._filled(transfer)
            return
        stripe = transfer.stripe
        self.progress[stripe] = transfer.sent
        if transfer.sent == transfer.pieces:
            del self.transfers[stripe]
            grant = self.pursuit.receiving[stripe]
            outcome = self.pursuit.ended(stripe, None, self.node.fleet.time.now)
            assert isinstance(grant, Grant)
            self._ended.append((grant, outcome))
            self.act()
        self.node.kick()

    def _filled(self, transfer: Transfer) -> None:
        span = self.pursuit.filling
        assert span is not None
        size, done = self.layer.size, transfer.stripe
        length = -(-stripe_length(size, span.first) // PIECE)
        if transfer.sent < self._before(done, span.first) + length:
            return
        if transfer.sent == transfer.pieces:
            del self.transfers["fill"]
        self.pursuit.filled(span.first, b"%032d" % span.first)
        self.act()

    def _before(self, first: int, stripe: int) -> int:
        """How many pieces the stripes of a fill have before this one."""
        size = self.layer.size
        return sum(-(-stripe_length(size, s) // PIECE) for s in range(first, stripe))

    def _complete(self) -> None:
        now = self.node.fleet.time.now
        self.is_done = True
        self.pursuit.found_right(now)
        fresh = self.pursuit.step(0, now).publish
        if fresh is not None:
            self._publish(fresh, self._leave)
        self._tell_whole()
        self.node.next_layer()

    def _leave(self) -> None:
        if not self.pursuit.is_spared_on:
            self._ask("settle", self.node.claims.settle(self.layer.digest), _nothing)

    def _tell_whole(self) -> None:
        digest, claims = self.layer.digest, self.node.claims
        if self._ended:
            self._ask("take", claims.take(digest, (), 0, ended=self._ended), _nothing)
        self._ask("hold", claims.hold(digest, self.pursuit.generation, WHOLE), _nothing)


def _nothing(_answer: object) -> None:
    """Nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of each node's own pull, bytes of the upstream, calls of the directory by name, and
    the most of these in any second."""

    seconds: Sequence[float]
    upstream: int
    operations: Counter[str]
    busiest_second: int
    longest_wait: float
    busy: float


@dataclass(slots=True)
class Fleet:
    """So many nodes on one board, and the upstream."""

    count: int
    terms: Terms = field(default_factory=Terms)
    rate: float = RATE
    zones: int = 1
    at_once: int = AT_ONCE
    spread: float = 0.05  # seconds over which a crowd arrives
    seed: int = 1
    time: Time = field(default_factory=Time)
    rng: random.Random = field(init=False)
    board: Board = field(init=False)
    upstream: Sender = field(init=False)
    nodes: dict[str, Node] = field(init=False)
    directory: Directory = field(init=False)
    _waves: deque[tuple[Sequence[Node], Sequence[Layer]]] = field(default_factory=deque)
    _running: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.directory = Directory(self.time)
        self.board = Board(clock=self.time, rng=self.rng, terms=self.terms)
        self.upstream = Sender(self.time, self.piece_time)
        nodes = [Node(self, number) for number in range(self.count)]
        self.nodes = {node.giver.node: node for node in nodes}

    @property
    def piece_time(self) -> float:
        return PIECE / self.rate

    def first_pause(self) -> float:
        """Seconds until a node of the crowd has come, and asks."""
        pause = self.rng.uniform(0, self.spread)
        if self.count > FEW:
            pause += before_first(self.count, self.rng.random())
        return pause

    def play(self, layers: Sequence[Layer], waves: int = 1) -> Result:
        """All nodes pull these layers; in waves, each when the one before has finished."""
        nodes = list(self.nodes.values())
        for number in range(waves):
            self._waves.append((nodes[number::waves], layers))
        self._next_wave()
        self.time.run()
        unfinished = [node for node in nodes if node.done is None]
        if unfinished:
            raise AssertionError(f"{len(unfinished)} did not finish: {unfinished[0].pulls}")
        return Result(
            [node.done - node.began for node in nodes if node.done is not None],
            self.upstream.sent * PIECE,
            self.directory.calls,
            max(self.directory.by_second.values()),
            self.directory.longest_wait,
            self.directory.busy,
        )

    def _next_wave(self) -> None:
        if self._waves:
            nodes, layers = self._waves.popleft()
            self._running = len(nodes)
            for node in nodes:
                node.begin(layers)

    def finished(self, _node: Node) -> None:
        self._running -= 1
        if not self._running:
            self._next_wave()
