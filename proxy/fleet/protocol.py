"""What nodes say to one another: the one request there is, and the names of headers.

    GET /fleet/v2/blobs/sha256:<hex>/stripes/<number>
    Pullpool-Rank: <the taker's rank for the stripe>   (see claims.py)
    Pullpool-Stripe: <the stripe's hash, in hex>       (left out by who does not know it)
    Range: bytes=<position within the stripe>-         (left out at 0)

    200 | 206, Content-Length, Pullpool-Pieces: base64 of the digests of all pieces of the stripe
    409 what is held has another hash: an honest giver of what was published before
    404 not held, 403 not shared, 503 + Retry-After no room, 401 not sealed as it has to be

Nothing is decoded or normalised: a request that is not written exactly so is none, and no two
readers of it can disagree about what it means. Positions are those where a piece begins, as nothing
else could be verified.
"""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass

from proxy.fleet.pieces import MOST, PIECE, Pieces
from proxy.oci.digest import Digest
from proxy.oci.errors import EndpointUnknown, RequestInvalid

PIECES = "Pullpool-Pieces"
RANK = "Pullpool-Rank"
STRIPE = "Pullpool-Stripe"
SEAL = "Pullpool-Seal"

_PATH = re.compile(
    r"/fleet/v2/blobs/(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})/stripes/(0|[1-9][0-9]{0,6})"
)
_RANGE = re.compile(r"bytes=([1-9][0-9]{0,8})-")
_HASH = re.compile(r"[0-9a-f]{64}")
_RANK = re.compile(r"[1-9][0-9]{0,9}")


@dataclass(frozen=True, slots=True)
class StripeAsk:
    """One stripe of a blob, from ``start`` on, which is where a piece begins; ``rank``: the taker's
    for this stripe.

    Raises ``RequestInvalid`` for a position where none does.
    """

    digest: Digest
    stripe: int
    rank: int
    start: int = 0
    stripe_hash: bytes | None = None  # what the taker was told that it is

    def __post_init__(self) -> None:
        if not 0 <= self.start < MOST or self.start % PIECE:
            raise RequestInvalid(f"no piece begins at byte {self.start}")

    @classmethod
    def parse(
        cls,
        raw_path: str,
        rank: str | None,
        range_header: str | None,
        stripe_hash: str | None = None,
    ) -> StripeAsk:
        """Read a request's path with its query, as it came, and its headers. Raises
        ``EndpointUnknown`` or ``RequestInvalid``."""
        found = _PATH.fullmatch(raw_path)
        if found is None:
            raise EndpointUnknown
        if not _RANK.fullmatch(rank or ""):
            raise RequestInvalid(f"{RANK} is a number from 1 on")
        if stripe_hash is not None and not _HASH.fullmatch(stripe_hash):
            raise RequestInvalid(f"{STRIPE} is a SHA-256 hash in lower-case hex")
        told = None if stripe_hash is None else bytes.fromhex(stripe_hash)
        start = _start(range_header)
        return cls(Digest.parse(found[1]), int(found[2]), int(rank or ""), start, told)

    @property
    def path(self) -> str:
        return f"/fleet/v2/blobs/{self.digest}/stripes/{self.stripe}"

    @property
    def range(self) -> str | None:
        """The Range header; None for the whole stripe."""
        return f"bytes={self.start}-" if self.start else None

    def __str__(self) -> str:
        return f"stripe {self.stripe} of {self.digest} from byte {self.start}"


def _start(header: str | None) -> int:
    if header is None:
        return 0
    found = _RANGE.fullmatch(header)
    if found is None:
        raise RequestInvalid("a range of a stripe is bytes=POSITION-")
    return int(found[1])


def written(pieces: Pieces) -> str:
    """The digests as a header."""
    return base64.b64encode(pieces.digests).decode()


def read_pieces(header: str, length: int) -> Pieces:
    """Read that header for a stripe of ``length`` bytes. Raises ``ValueError``."""
    try:
        digests = base64.b64decode(header, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{PIECES} is no base64: {error}") from error
    return Pieces(length, digests)
