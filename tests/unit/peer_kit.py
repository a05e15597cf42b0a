"""What the tests of peers share: a stripe, grants for it, and the two ends of a conversation."""

import contextlib
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import trustme

from proxy.fleet.claims import Giver, Grant
from proxy.fleet.peers import Peers, Wanted
from proxy.fleet.pieces import PIECE
from proxy.fleet.seal import Sealer
from proxy.observe.metrics import Metrics
from proxy.observe.peers import PeerMetrics
from proxy.oci.digest import Digest
from proxy.oci.errors import PeerFailed
from proxy.testing import FakeClock
from proxy.testing.peer import pieces_of
from proxy.throttle import Throttle
from proxy.web.tls import TlsFiles

TAKER, GIVER = "a" * 16, "b" * 16
SECRET = b"a secret of the fleet"
#: Three pieces, the last one short; no two pieces are alike.
STRIPE = b"".join(bytes([n]) * PIECE for n in (1, 2)) + b"the end"
DIGEST = Digest.of(STRIPE)
WALL = FakeClock(1_000_000.0)


def sealer(node: str, *, wall: Callable[[], float] = WALL, secret: bytes = SECRET) -> Sealer:
    return Sealer(secret, node, wall=wall)


def grant(url: str, *, node: str = GIVER, digest: Digest = DIGEST, stripe: int = 0) -> Grant:
    giver = Giver(node, "giver", "zone", url)
    return Grant(digest, "generation", stripe, giver, 1, "token")


def wanted(start: int = 0, *, data: bytes = STRIPE) -> Wanted:
    return Wanted(len(data), pieces_of(data).stripe_hash, start)


class Taker:
    """A client of peers, and what it counts."""

    def __init__(self, peers: Peers, metrics: Metrics) -> None:
        self.peers = peers
        self.metrics = metrics

    async def take(self, url: str, start: int = 0, *, node: str = GIVER) -> bytes:
        """A whole transfer."""
        return b"".join(await self.pieces(url, start, node=node))

    async def pieces(self, url: str, start: int = 0, *, node: str = GIVER) -> list[bytes]:
        """Its pieces."""
        async with self.peers.taking(grant(url, node=node), wanted(start)) as transfer:
            return [b"".join(chunks) async for chunks in transfer]

    async def until_failure(self, url: str) -> tuple[bytes, PeerFailed]:
        """What comes before a transfer fails, and how it does."""
        got = bytearray()
        try:
            async with self.peers.taking(grant(url), wanted()) as transfer:
                async for chunks in transfer:
                    got += b"".join(chunks)
        except PeerFailed as error:
            return bytes(got), error
        raise AssertionError("all of it came")

    def count(self, sample: str, **labels: str) -> float:
        name = f"pullpool_peer_{sample}"
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def outcome(self, word: str) -> float:
        return self.count("takes_total", outcome=word)


@contextlib.asynccontextmanager
async def taking(
    *,
    sealer: Sealer | None = None,
    tls: ssl.SSLContext | None = None,
    downlink: Throttle | None = None,
    patience: float = 30.0,
    sockets: int = 4,
    idle: int = 64,
    idle_seconds: float = 30.0,
) -> AsyncIterator[Taker]:
    """A client that is closed at the end, when it must not have a socket left."""
    metrics = Metrics()
    peers = Peers(
        metrics=PeerMetrics(metrics),
        sealer=sealer,
        tls=lambda: tls,
        downlink=downlink,
        patience=patience,
        sockets=sockets,
        idle=idle,
        idle_seconds=idle_seconds,
    )
    try:
        yield Taker(peers, metrics)
    finally:
        await peers.close()
        assert len(peers) == 0


@dataclass(frozen=True, slots=True)
class Pki:
    """An authority of a fleet, and the certificate of a node on the loopback address."""

    ca: trustme.CA
    directory: Path

    @classmethod
    def made(cls, directory: Path) -> "Pki":
        directory.mkdir(parents=True, exist_ok=True)
        pki = cls(trustme.CA(), directory)
        pki.ca.cert_pem.write_to_path(pki.files.client_ca or directory)
        pki.issue()
        return pki

    @property
    def files(self) -> TlsFiles:
        at = self.directory
        return TlsFiles(at / "cert.pem", at / "key.pem", at / "ca.pem")

    def issue(self, name: str = "127.0.0.1", ca: trustme.CA | None = None) -> None:
        """Write a new certificate."""
        issued = (ca or self.ca).issue_cert(name, common_name="a node")
        self.files.cert.write_bytes(b"".join(c.bytes() for c in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(self.files.key)
