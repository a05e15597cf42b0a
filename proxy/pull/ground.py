"""What a sharing works with: the fill that it brings bytes to, who receives stripes, and what all
sharings of a node have in common."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from proxy.fleet.claims import Claims, Giver, Grant, Terms
from proxy.fleet.peers import Wanted
from proxy.fleet.pieces import Pieces
from proxy.fleet.shunned import Shunned
from proxy.fleet.traffic import Traffic
from proxy.observe.logs import Logger
from proxy.oci.digest import Chunk, Digest
from proxy.pull.segments import Segment
from proxy.store.blobs import FileLease


class Incoming(Protocol):
    """A stripe that is being received; asynchronously iterable: its verified pieces."""

    pieces: Pieces

    def __aiter__(self) -> Incoming: ...

    async def __anext__(self) -> Sequence[Chunk]: ...


class Taker(Protocol):
    """Who receives stripes of other nodes: ``Peers`` is one."""

    def taking(self, grant: Grant, wanted: Wanted) -> AbstractAsyncContextManager[Incoming]: ...


class Ground(Protocol):
    """The fill whose bytes are shared."""

    @property
    def has_place(self) -> bool:
        """Has a byte come?"""
        ...

    def reached(self, position: int) -> int:
        """The end of the bytes that are there without a gap from ``position`` on."""
        ...

    def is_free(self, start: int, stop: int) -> bool:
        """Does nobody bring any of it? Raises ``StoreFull`` when the fill goes on alone."""
        ...

    def is_empty(self, start: int, stop: int) -> bool:
        """Is none of it there? Raises ``StoreFull`` when the fill goes on alone."""
        ...

    def claim(self, start: int, stop: int) -> Segment:
        """The right to bring this range, which is free."""
        ...

    async def put(self, segment: Segment, chunks: Sequence[Chunk]) -> None:
        """Take in the next bytes of a segment that was claimed; what is there of them stays. Raises
        ``StoreFull`` when the fill goes on alone, and ``StoreFailed``."""

    def give_back(self, segment: Segment) -> None: ...

    def bind(self, start: int, stop: int) -> None: ...

    def unbind(self) -> None: ...

    def lend(self) -> FileLease:
        """The file, for as long as the lease. Raises ``StoreFailed``."""


@dataclass(frozen=True, slots=True)
class Fellows:
    """A node's part in its fleet. ``clock`` is monotonic; ``may_share`` says of an upstream whether
    the fleet may have its blobs; ``kept`` is told of each blob that the fleet was told is here;
    ``is_up``: does the directory answer? ``before_first``: how many seconds it is left in peace
    before it is asked for another blob."""

    giver: Giver
    claims: Claims
    taker: Taker
    clock: Callable[[], float]
    log: Logger
    may_share: Callable[[str], bool]
    kept: Callable[[Digest, str], None] = lambda _digest, _generation: None
    is_up: Callable[[], bool] = lambda: True
    before_first: Callable[[], float] = lambda: 0.0
    terms: Terms = field(default_factory=Terms)
    rng: random.Random = field(default_factory=random.Random)
    shunned: Shunned = field(default_factory=Shunned)
    traffic: Traffic = field(default_factory=Traffic)
