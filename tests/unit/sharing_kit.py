"""Nodes of a fleet in one process: flights over stores of their own, one board, no network.

What is real: flights, sharings, pursuits, stores, the claims of one process. A stripe goes from one
node's file to the other's flight without a socket, checked as a peer's is, and may be held back,
spoilt or broken on its way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from proxy.fleet.board import Board
from proxy.fleet.claims import Claims, Giver, Grant
from proxy.fleet.local_claims import LocalClaims
from proxy.fleet.peers import Wanted
from proxy.fleet.pieces import PIECE, Pieces, piece_digest
from proxy.fleet.protocol import StripeAsk
from proxy.oci.digest import Chunk, Digest
from proxy.oci.errors import NotFound, PeerFailed, PeerLied
from proxy.pull.giving import OpenStripe
from proxy.pull.ground import Fellows
from proxy.pull.reader import FileSpan
from proxy.pull.stripes import FleetShelf
from proxy.pull.trial import Trial, try_two
from tests.unit.flight_kit import Rig, flying
from tests.unit.proxy_kit import Pauses
from tests.unit.store_kit import silent


@dataclass
class Wire:
    """What happens between nodes. ``spoil`` may change a piece that a node sends; ``gate`` is
    waited for before each piece that it sends; ``dead`` nodes do not answer."""

    spoil: dict[str, Callable[[bytes], bytes]] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    taken: list[tuple[str, str, int]] = field(default_factory=list)  # giver, taker, stripe


class Incoming:
    """One stripe on its way from one node's shelf to another node."""

    def __init__(self, wire: Wire, giver: str, stripe: OpenStripe, wanted: Wanted) -> None:
        self.pieces: Pieces = stripe.pieces
        self._wire = wire
        self._giver = giver
        self._spans = stripe.read(wanted.start)
        self._position = wanted.start
        self._rest = b""

    def __aiter__(self) -> Incoming:
        return self

    async def __anext__(self) -> Sequence[Chunk]:
        if self._position == self.pieces.length:
            raise StopAsyncIteration
        gate = self._wire.gates.get(self._giver)
        if gate is not None:
            await gate.wait()
        length = min(PIECE, self.pieces.length - self._position)
        while len(self._rest) < length:
            self._rest += await self._read()
        if self._giver in self._wire.dead:
            raise PeerFailed("the node has died")
        piece, self._rest = self._rest[:length], self._rest[length:]
        piece = self._wire.spoil.get(self._giver, bytes)(piece)
        if piece_digest([piece]) != self.pieces.digest(self._position // PIECE):
            raise PeerLied("a piece is not the one that was announced")
        self._position += length
        return [piece]

    async def _read(self) -> bytes:
        try:
            span = await anext(self._spans)
        except (NotFound, StopAsyncIteration) as error:
            raise PeerFailed("no more of the stripe comes") from error
        assert isinstance(span, FileSpan)
        return os.pread(span.lease.fileno(), span.length, span.start)

    async def close(self) -> None:
        await self._spans.aclose()


class DirectTaker:
    """Takes stripes of the shelves of nodes in this process."""

    def __init__(self, name: str, wire: Wire, shelves: dict[str, FleetShelf]) -> None:
        self._name = name
        self._wire = wire
        self._shelves = shelves

    @asynccontextmanager
    async def taking(self, grant: Grant, wanted: Wanted) -> AsyncIterator[Incoming]:
        giver = grant.giver.node
        if giver in self._wire.dead:
            raise PeerFailed("nobody answers")
        try:
            ask = StripeAsk(grant.digest, grant.stripe, grant.rank)
            stripe = await self._shelves[giver].open(ask)
        except NotFound as error:
            raise PeerFailed(str(error), answered=404) from error
        try:
            if wanted.stripe_hash not in (None, stripe.pieces.stripe_hash):
                raise PeerLied("the pieces do not make up the stripe's hash")
            if stripe.pieces.length != wanted.length:
                raise PeerLied("it has another number of bytes to send")
            self._wire.taken.append((giver, self._name, grant.stripe))
            incoming = Incoming(self._wire, giver, stripe, wanted)
            try:
                yield incoming
            finally:
                await incoming.close()
        finally:
            stripe.close()


@dataclass
class Node:
    """One node: its flights, and its name in the directory."""

    giver: Giver
    rig: Rig
    fellows: Fellows
    shelf: FleetShelf


@dataclass
class Fleet:
    """Nodes, their board, and what is between them."""

    board: Board
    wire: Wire
    nodes: list[Node]

    @property
    def ids(self) -> list[str]:
        return [node.giver.node for node in self.nodes]


@asynccontextmanager
async def sailing(
    directory: Path,
    count: int,
    *,
    clock: Callable[[], float] | None = None,
    claims: Callable[[Giver], Claims] | None = None,
    max_size: int = 256 << 20,
    is_up: Callable[[], bool] = lambda: True,
    before_first: Callable[[], float] = lambda: 0.0,
    segment_bytes: int = 4 << 20,
    gather: float = 0.0,
    trial: Trial = try_two,
) -> AsyncIterator[Fleet]:
    """A fleet of so many nodes; at its end nothing may be left of them."""
    loop = asyncio.get_running_loop()
    clock = clock or loop.time
    board = Board(clock=clock, rng=random.Random(1))
    wire, shelves = Wire(), dict[str, FleetShelf]()
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for number in range(count):
            name = f"{number:016x}"
            giver = Giver(name, f"node-{number}", "", f"http://{name}")
            fellows = Fellows(
                giver=giver,
                claims=claims(giver) if claims else LocalClaims(board, giver),
                taker=DirectTaker(name, wire, shelves),
                clock=clock,
                log=silent(),
                may_share=lambda upstream: upstream != "private.example.com",
                rng=random.Random(number),
                is_up=is_up,
                before_first=before_first,
            )
            rig = await stack.enter_async_context(
                flying(
                    directory / name,
                    fellows=fellows,
                    max_size=max_size,
                    segment_bytes=segment_bytes,
                    gather=gather,
                    clock=Pauses(),
                    trial=trial,
                )
            )
            shelf = FleetShelf(rig.flights, rig.store, may_share=everything)
            stack.push_async_callback(shelf.close)
            shelves[name] = shelf
            nodes.append(Node(giver, rig, fellows, shelf))
        try:
            yield Fleet(board, wire, nodes)
        finally:  # all of them, before any looks for what it has left
            for node in nodes:
                for reader in node.rig.readers:
                    reader.close()
                await node.rig.flights.close()
        for node in nodes:
            assert repr(node.fellows.traffic) == "<Traffic: 0 stripes, 0 blobs filled>"


async def everything(_digest: Digest) -> bool:
    """All may be shared."""
    return True
