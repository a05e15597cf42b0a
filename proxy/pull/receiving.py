"""Stripes of other nodes, on their way into the file of a flight (D16)."""

from __future__ import annotations

from proxy.fleet.claims import Grant
from proxy.fleet.peers import Wanted
from proxy.fleet.pieces import PIECE, Pieces
from proxy.fleet.shunned import Why
from proxy.fleet.stripes import stripe_length, stripe_size
from proxy.oci.digest import Digest
from proxy.oci.errors import PeerBusy, PeerFailed, PeerLied, UnexpectedAnswer
from proxy.pull.ground import Fellows, Ground
from proxy.pull.lending import apart, hashed
from proxy.pull.progress import Bell


class Receiver:
    """Of one flight. ``pieces``: the digests of each stripe that was begun; ``bell`` rings whenever
    something has come, or may be free."""

    def __init__(self, fellows: Fellows, digest: Digest, size: int, bell: Bell) -> None:
        self.pieces: dict[int, Pieces] = {}
        self.has_begun_it = False  # the first bytes of all came from another node
        self._fellows = fellows
        self._digest = digest
        self._size = size
        self._bell = bell

    def start(self, stripe: int) -> int:
        """Where it begins; behind the last one, where the blob ends."""
        return min(self._size, stripe * stripe_size(self._size))

    async def hash(self, ground: Ground, stripe: int) -> Pieces:
        """The digests of a stripe that is in the file. Raises ``StoreFailed``."""
        length = stripe_length(self._size, stripe)
        return await hashed(ground.lend(), self.start(stripe), length)

    async def receive(self, ground: Ground, grant: Grant, expected: bytes | None) -> Why | None:
        """Put the stripe where it belongs; None when all of it is there, and right.

        Raises ``UnexpectedAnswer`` when the upstream has sent another one, ``StoreFull`` when the
        flight goes on alone, and ``StoreFailed``.
        """
        stripe = grant.stripe
        start, stop = self.start(stripe), self.start(stripe + 1)
        while not ground.is_free(start, stop):  # a turn that had begun before brings some of it
            await self._bell.wait()
        done = min(stop, ground.reached(start))
        is_mixed = not ground.is_empty(start, stop)  # a turn that has ended has brought some
        if done < stop:
            why = await self._bring(ground, grant, Wanted(stop - start, expected, 0), done)
            if why is not None:
                return why
            expected = self.pieces[stripe].stripe_hash
        if is_mixed:  # that came from the upstream: is it the same?
            self.pieces[stripe] = await self.hash(ground, stripe)
            if expected not in (None, self.pieces[stripe].stripe_hash):
                raise UnexpectedAnswer(f"the upstream sent another stripe {stripe} than the fleet")
        return None

    async def _bring(self, ground: Ground, grant: Grant, wanted: Wanted, done: int) -> Why | None:
        """What there is of it behind the byte ``done``."""
        start = self.start(grant.stripe)
        skip = (done - start) % PIECE
        segment = ground.claim(done, start + wanted.length)
        wanted = Wanted(wanted.length, wanted.stripe_hash, done - start - skip)
        try:
            async with self._fellows.taker.taking(grant, wanted) as incoming:
                self.pieces[grant.stripe] = incoming.pieces
                self._bell.ring()
                async for chunks in incoming:
                    self.has_begun_it = self.has_begun_it or not ground.has_place
                    await ground.put(segment, apart(chunks, skip)[1])
                    skip = 0
                    self._bell.ring()
        except PeerFailed as error:
            return self._judge(grant, error, is_proven=wanted.stripe_hash is not None)
        finally:
            ground.give_back(segment)
        return None

    def _judge(self, grant: Grant, error: PeerFailed, *, is_proven: bool) -> Why:
        """What a giver did that did not give. One of whom no hash was expected may be right about
        what we are wrong about, such as the size."""
        self._fellows.log.info(
            "peer_failed",
            digest=str(self._digest),
            stripe=grant.stripe,
            peer=grant.giver.name,
            cause=str(error),
        )
        if isinstance(error, PeerLied) and is_proven:
            self._fellows.log.warning("peer_shunned", peer=grant.giver.name, cause=str(error))
            return Why.LIED
        if isinstance(error, PeerBusy):
            return Why.BUSY
        if error.answered == 404:
            return Why.LACKED
        return Why.STALLED if error.has_stalled else Why.DIED

    def __repr__(self) -> str:
        return f"<Receiver of {self._digest}: {len(self.pieces)} stripes begun>"
