"""A node that gives: its listener, its log, and shelves that a test has in its hand."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from proxy.fleet.pieces import PIECE, Pieces
from proxy.fleet.protocol import StripeAsk
from proxy.fleet.seal import Sealer
from proxy.observe.logs import make_logger
from proxy.observe.metrics import Metrics
from proxy.observe.peers import PeerMetrics
from proxy.oci.errors import PullError
from proxy.pull.giving import OpenStripe, Shelf
from proxy.pull.reader import Piece
from proxy.testing.peer import pieces_of
from proxy.throttle import Throttle
from proxy.web.descriptors import Descriptors
from proxy.web.listener import Listener
from proxy.web.peer import PeerContexts, PeerDoor, giving
from proxy.web.transfers import Transfers
from tests.unit.peer_kit import STRIPE


class FlowingStripe:
    """A stripe whose giver is still receiving it: its pieces come as they are let go."""

    def __init__(self, data: bytes = STRIPE) -> None:
        self.pieces: Pieces = pieces_of(data)
        self.is_closed = False
        self.reads = 0
        self._data = data
        self._coming: asyncio.Queue[int | PullError] = asyncio.Queue()

    def come(self, piece: int) -> None:
        """This piece has been verified."""
        self._coming.put_nowait(piece)

    def fail(self, error: PullError) -> None:
        """No more will come."""
        self._coming.put_nowait(error)

    async def read(self, start: int) -> AsyncGenerator[Piece, None]:
        for at in range(start, len(self._data), PIECE):
            came = await self._coming.get()
            if isinstance(came, PullError):
                raise came
            assert came == at // PIECE
            self.reads += 1
            yield self._data[at : at + PIECE]

    def close(self) -> None:
        self.is_closed = True


class WholeStripe:
    """A stripe that is there, in memory."""

    def __init__(self, data: bytes = STRIPE) -> None:
        self.pieces: Pieces = pieces_of(data)
        self._data = data

    async def read(self, start: int) -> AsyncGenerator[Piece, None]:
        yield self._data[start:]

    def close(self) -> None:
        """Nothing is held."""


class OneStripe:
    """A shelf with one stripe, whatever is asked for, or an error for everybody."""

    def __init__(self, stripe: OpenStripe | Exception) -> None:
        self.stripe = stripe
        self.asked: list[StripeAsk] = []

    async def open(self, ask: StripeAsk) -> OpenStripe:
        self.asked.append(ask)
        if isinstance(self.stripe, Exception):
            raise self.stripe
        return self.stripe


class Giver:
    """A listener for peers, seen from outside."""

    def __init__(
        self,
        door: PeerDoor,
        listener: Listener,
        transfers: Transfers,
        metrics: Metrics,
        log: io.StringIO,
        scheme: str,
    ) -> None:
        self.door = door
        self.listener = listener
        self.transfers = transfers
        self.metrics = metrics
        self.url = f"{scheme}://127.0.0.1:{listener.port}"
        self._log = log

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = map(json.loads, self._log.getvalue().splitlines())
        return [line for line in lines if line["event"] == name]

    def count(self, sample: str, **labels: str) -> float:
        name = f"pullpool_peer_{sample}"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def ask(self, head: str) -> bytes:
        """What comes back for a request written by hand, which must say `Connection: close`."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.listener.port)
        try:
            writer.write(head.replace("\n", "\r\n").encode())
            return await reader.read()
        finally:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def giver(
    shelf: Shelf,
    *,
    sealer: Sealer | None = None,
    contexts: PeerContexts | None = None,
    needs_certificate: bool | None = None,
    uplink: Throttle | None = None,
    places: int = 4,
    waiting: int | None = None,
    patience: float = 30.0,
    stuck: float = 30.0,
    is_draining: bool = False,
    host: str = "127.0.0.1",
) -> AsyncIterator[Giver]:
    metrics, log = Metrics(), io.StringIO()
    transfers = Transfers(places, waiting=waiting, patience=patience)
    logger = make_logger("json", log)
    door = PeerDoor(
        shelf,
        transfers=transfers,
        metrics=PeerMetrics(metrics),
        log=logger,
        clock=time.monotonic,
        sealer=sealer,
        needs_certificate=contexts is not None if needs_certificate is None else needs_certificate,
        uplink=uplink,
        is_draining=lambda: is_draining,
        stuck=stuck,
    )
    serving = giving(
        door,
        host,
        0,
        descriptors=Descriptors(1 << 20),
        log=logger,
        contexts=contexts,
        interval=0.01,
    )
    async with serving as listener:
        scheme = "http" if contexts is None else "https"
        yield Giver(door, listener, transfers, metrics, log, scheme)
