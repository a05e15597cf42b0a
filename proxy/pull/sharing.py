"""A flight's part in the fleet: its blob comes from other nodes, or it brings it for them (D16).

Theory of operation
-------------------
A *sharing* belongs to one flight and lasts as long. What it decides is decided by its ``Pursuit``
(fleet/pursuit.py); here that is done: one task, the *stepper*, asks it for the next step, speaks
with the directory, one call at a time, and begins what the step says. What happens meanwhile is
told to the pursuit at once, and wakes the stepper. What it says to the directory, and that it says
so often enough, is ``claiming.py``'s.

Bytes reach the flight on two ways, never both for the same byte:

* *received*: a stripe of another node. Each is a task of its own and claims its range in the
  fill's plan; its pieces are verified against the stripe's hash. Readers follow as behind segments.
* *filled*: by the flight's own turns, from the upstream. They may bring what the plan is *bound* to
  and nothing else: stripes that this node has the fleet's word for. Which connection brings which
  part of those is the fill's own business, as ever. A stripe that is complete is hashed from the
  file, and published.

So while another node fills, the plan is bound to nothing, and the flight's turns wait. The sharing
is a help and no condition: when it ends, for whatever reason, the plan is *unbound*, the transfers
end, and the flight goes on as it would without a fleet. The digest of the whole decides (D10).

The fill may drop the plan, because its upstream knows no ranges or the disk is full. Then nothing
can be received any more, but what its turns bring in order is still hashed and published.

A filler whose upstream fails, or brings nothing for ``PATIENCE`` seconds (its turn may stand in a
long queue, behind everybody if nobody reads here), gives that up for ``REST`` seconds, or until its
turn brings something after all. The turn stays where it is unless another node fills meanwhile:
then it is called back, or ends where it is.

What there is of a stripe is passed on while it comes (``open``). Whoever takes it holds a lease of
the file, and so outlives the flight.

Cancellation: ``close`` ends the stepper and every transfer, then gives the fill up, so that another
node may go on at once. What was promised to the directory and is not withdrawn ends by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from proxy.fleet.claims import Grant
from proxy.fleet.patience import FIRST_LOOK
from proxy.fleet.pursuit import GRACE, TRIES, Pursuit
from proxy.fleet.shunned import Why
from proxy.fleet.steps import Ask, Step
from proxy.fleet.stripes import Span, lowest_zero
from proxy.oci.digest import Digest
from proxy.oci.errors import DirectoryDown, NotFound, PullError
from proxy.pull.claiming import Claiming
from proxy.pull.ground import Fellows, Ground
from proxy.pull.lending import LentStripe
from proxy.pull.progress import Bell
from proxy.pull.receiving import Receiver
from proxy.store.blobs import StoreFull

#: Seconds without a byte of the upstream after which a filler lets another node try.
PATIENCE = 5.0
#: Seconds for which it does: in these others look whether somebody fills.
REST = 2.0


def share(fellows: Fellows, upstream: str, digest: Digest, size: int | None) -> Sharing | None:
    """A part in the fleet for a flight that begins; None if its blob is not for others."""
    if not size or not fellows.may_share(upstream):
        return None
    return Sharing(fellows, digest, size)


class Sharing:
    """One flight's part. ``run`` once, as a task; then ``close``."""

    def __init__(self, fellows: Fellows, digest: Digest, size: int) -> None:
        self.digest = digest
        self.size = size
        self._fellows = fellows
        self._pursuit = Pursuit(
            fellows.giver,
            shunned=fellows.shunned,
            rng=fellows.rng,
            size=size,
            traffic=fellows.traffic,
        )
        self._claiming = Claiming(fellows, self._pursuit, digest, size)
        self._givings: Counter[int] = Counter()  # who receives which stripe of us
        self._ground: Ground | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()
        self._bell = Bell()
        self._receiver = Receiver(fellows, digest, size, self._bell)
        self._failure: Exception | None = None  # ours, in a transfer
        self._is_over = False
        self._has_failed = False  # the upstream, since it was looked at
        self._moved_at = fellows.clock()  # when a byte came
        self._rests_until = 0.0  # and lets others fill
        self._rested_at = 0  # how far its own turns had come then

    @property
    def is_of_peers(self) -> bool:
        """Did its first bytes come from another node?"""
        return self._receiver.has_begun_it

    @property
    def is_receiving(self) -> bool:
        """Does this node receive stripes, of whichever blob?"""
        return self._fellows.traffic.is_receiving

    # -- the stepper -----------------------------------------------------------------------

    async def run(self, ground: Ground) -> None:
        """Share until every stripe is there. Never fails the flight."""
        self._ground = ground
        try:
            await self._step_on()
            return
        except (PullError, StoreFull) as error:  # the flight finds that out for itself
            self._fellows.log.info("sharing_ended", digest=str(self.digest), cause=str(error))
        except Exception:  # a defect of ours: the flight goes on without the fleet
            self._fellows.log.exception("sharing_defect", digest=str(self.digest))
        finally:
            ground.unbind()
        await self.close()  # others may go on at once

    async def _step_on(self) -> None:
        if not self._fellows.is_up():  # as it has been for a while: nothing to wait for
            self._pursuit.directory_gone(self._fellows.clock() - GRACE)
        elif pause := self._fellows.before_first():
            await asyncio.sleep(pause)
        claiming = self._claiming
        await claiming.told(claiming.look(0))
        while not self._pursuit.is_complete:
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._hash_filled()
            await claiming.told(self._let_others())
            step = self._step()
            if await claiming.told(self._act(step)):
                continue  # what was said leads to another step
            if await claiming.told(claiming.renew()):
                continue
            try:
                async with asyncio.timeout(step.wait or FIRST_LOOK):
                    await self._news.wait()
            except TimeoutError:
                need, now = lowest_zero(self._pursuit.have), self._fellows.clock()
                if self._pursuit.is_to_look(need, now):
                    await claiming.told(claiming.look(self._pursuit.published))
        await claiming.told(claiming.give_back())

    def _step(self) -> Step:
        return self._pursuit.step(lowest_zero(self._pursuit.have), self._fellows.clock())

    async def _act(self, step: Step) -> bool:
        """Do it; whether another step may follow from that at once."""
        self._begin(step)
        claiming = self._claiming
        if step.drop is not None:
            return await claiming.drop(step.drop)
        if step.lead and self._fellows.clock() >= self._rests_until:
            await claiming.lead()
            self._moved_at, self._has_failed = self._fellows.clock(), False
            return self._pursuit.is_filler
        if step.publish is not None and not await claiming.publish(step.publish):
            return True
        if step.hold:
            await claiming.hold()
        if step.wishes and step.room:
            for grant in await claiming.take(step):
                self._receive(grant)
            if self._pursuit.is_stale:
                await claiming.look(self._pursuit.published)
        elif not step.saves:
            await claiming.give_back()
        return False

    async def _let_others(self) -> bool:
        """A filler that brings nothing lets another one try, if anybody wants to."""
        now = self._fellows.clock()
        is_late = self._pursuit.filling is not None and now - self._moved_at >= PATIENCE
        if not self._pursuit.is_filler or not (is_late or self._has_failed):
            return False
        self._has_failed, self._rests_until = False, now + REST
        self._rested_at = self._front()
        return await self._claiming.let_others()

    def _begin(self, step: Step) -> None:
        """What needs no word with anybody."""
        ground, pursuit = self._required, self._pursuit
        if step.stop:
            pursuit.fill_ended(None, self._fellows.clock())
            ground.bind(0, 0)
        for ask in step.asks:
            pursuit.asked(ask)
            self._receive(ask)
        if step.fill is not None:
            pursuit.begun(step.fill)
            if step.fill.of is None:
                ground.bind(self._start(step.fill.first), self._start(step.fill.last))
                self.wrote()  # some of it may be there: of a process before, or of earlier turns
            else:
                self._spawn(self._fill_of_peer(step.fill), f"fill of {step.fill.of}")

    # -- bytes of other nodes --------------------------------------------------------------

    def _receive(self, received: Grant | Ask) -> None:
        stripe = received.stripe
        self._claiming.begun(stripe)
        receiving = self._received(received, self._pursuit.expected(stripe))
        self._spawn(receiving, f"stripe {stripe} of {self.digest}")

    async def _received(self, received: Grant | Ask, expected: bytes | None) -> None:
        """One stripe's transfer, to its end. One that is cancelled tells nobody anything."""
        stripe = received.stripe
        try:
            why = await self._transfer(self._grant(received), expected)
        except Exception as error:  # ours: neither the giver's fault nor the flight's end
            self._failure = error
            self._news.set()
            return
        outcome = self._pursuit.ended(stripe, why, self._fellows.clock())
        self._changed(stripe)
        grant = received if isinstance(received, Grant) else None
        await self._claiming.ended(stripe, grant, outcome)

    def _grant(self, received: Grant | Ask) -> Grant:
        """What is asked for; without a directory as if it had been granted."""
        if isinstance(received, Grant):
            return received
        generation = self._pursuit.generation
        return Grant(
            self.digest, generation, received.stripe, received.giver, received.rank, token=""
        )

    async def _transfer(self, grant: Grant, expected: bytes | None) -> Why | None:
        return await self._receiver.receive(self._required, grant, expected)

    async def _fill_of_peer(self, span: Span) -> None:
        """A node that has the whole blob gives what was never published, or is so no more."""
        why: Why | None = Why.DIED
        try:
            for stripe in range(span.first, span.last):
                why = await self._fill_stripe(span, stripe)
                if why is not None:
                    break
        except Exception as error:
            self._failure, why = error, None
        self._pursuit.fill_ended(why, self._fellows.clock())
        self._news.set()

    async def _fill_stripe(self, span: Span, stripe: int) -> Why | None:
        giver = self._pursuit.giver(span.of)
        if giver is None:
            return Why.DIED
        why = await self._transfer(self._grant(Ask(stripe, giver, 1)), None)
        if why is None:
            if not self._pursuit.filled(stripe, self._receiver.pieces[stripe].stripe_hash):
                return Why.LIED
            self._changed(stripe)
        return why

    # -- bytes of the upstream -------------------------------------------------------------

    def wrote(self) -> None:
        """The fill has more, or one that brought some has ended: is the next stripe complete?"""
        self._bell.ring()
        self._moved_at = self._fellows.clock()
        span = self._pursuit.filling
        if self._ground is None or span is None or span.of is not None:
            return
        front = self._front()
        if front > self._rested_at and self._rests_until:
            self._rests_until = 0.0
            self._news.set()
        if front >= self._start(span.first + 1):
            self._news.set()

    def _front(self) -> int:
        """How far the turns have come with what they are to bring."""
        span = self._pursuit.filling
        return 0 if span is None else self._reached(self._start(span.first))

    def upstream_failed(self) -> None:
        """A turn of the fill was refused, or broke."""
        self._has_failed = True
        self._news.set()

    async def _hash_filled(self) -> None:
        """Hash what the fill's turns have completed."""
        pursuit = self._pursuit
        while (span := pursuit.filling) is not None and span.of is None:
            stripe = span.first
            if self._reached(self._start(stripe)) < self._start(stripe + 1):
                return
            pieces = await self._receiver.hash(self._required, stripe)
            if not pursuit.filled(stripe, pieces.stripe_hash):
                # Somebody published another hash of it: the digest of all will tell who was right.
                pursuit.found_wrong()
                return
            self._receiver.pieces[stripe] = pieces
            self._changed(stripe)

    # -- bytes for other nodes -------------------------------------------------------------

    async def open(self, stripe: int, rank: int) -> LentStripe:
        """What there is of a stripe, and what comes of it. Waits for the digests of its pieces,
        while it is received. Raises ``NotFound`` and ``StoreFailed``."""
        while not self._is_over and self._pursuit.may_pass_on(stripe, rank):
            pieces, ground = self._receiver.pieces.get(stripe), self._ground
            if pieces is not None and ground is not None and ground.has_place:
                lease = ground.lend()
                self._givings[stripe] += 1
                return LentStripe(self, stripe, pieces, lease)
            await self._bell.wait()
        raise NotFound("blob", f"stripe {stripe} of {self.digest} is not here")

    def closed(self, stripe: int) -> None:
        """One who received it of us does not any more."""
        self._givings[stripe] -= 1
        if not self._givings[stripe]:
            del self._givings[stripe]
            self._pursuit.unasked(stripe)

    def reached(self, stripe: int, position: int) -> int | None:
        """How far from ``position`` in the stripe its bytes are there; None: no more will come."""
        start = self._start(stripe)
        reached = min(self._reached(start + position), self._start(stripe + 1)) - start
        if reached > position or self._will_come(stripe):
            return reached
        return None

    def _will_come(self, stripe: int) -> bool:
        return not self._is_over and self._pursuit.rank(stripe) is not None

    async def changed(self) -> None:
        """Wait for the next piece, or that something else has changed."""
        await self._bell.wait()

    # -- the end ---------------------------------------------------------------------------

    async def was_right(self) -> None:
        """The digest is right: let the others have what was held back, and say who has it."""
        pursuit = self._pursuit
        if self._is_over or self._ground is None:
            return  # the flight went on without the fleet
        if self._tasks:
            await asyncio.wait(list(self._tasks))  # all there is has come
        await self._hash_filled()
        if not pursuit.is_complete:
            return
        for name in pursuit.found_right(self._fellows.clock()):
            self._fellows.log.warning("peer_shunned", peer=name, cause="it published other bytes")
        # What was being published when the flight had all may have been entered: then the directory
        # says how far, and the rest follows. It may say as well that a stripe is another one: what
        # is right already is not to be had of those who say so.
        for _ in range(TRIES):
            is_told = not await self._claiming.told(self._act(self._step()))
            if is_told or not pursuit.is_complete:
                break

    async def landed(self) -> None:
        """It is in the store, whole."""
        await self._claiming.told(self._claiming.hold_whole())

    async def was_wrong(self) -> None:
        """What the fleet gave was not the blob."""
        if self._is_over or self._ground is None:
            return  # it gave nothing, or too little to say that
        self._pursuit.found_wrong()
        await self._claiming.told(self._claiming.drop(self._pursuit.generation))

    async def close(self) -> None:
        """End every transfer; let another node fill, if this one did and there is more to fill."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks))
        self._pursuit.left()
        self._is_over = True
        self._bell.ring()
        with contextlib.suppress(DirectoryDown):
            await self._claiming.give_back()
        if not self._pursuit.is_spared_on:
            with contextlib.suppress(DirectoryDown):
                await self._claiming.settle()

    # -- tools -----------------------------------------------------------------------------

    @property
    def _required(self) -> Ground:
        if self._ground is None:
            raise ValueError(f"{self!r} has not begun")
        return self._ground

    def _start(self, stripe: int) -> int:
        return self._receiver.start(stripe)

    def _reached(self, position: int) -> int:
        return self._required.reached(position)

    def _changed(self, stripe: int) -> None:
        if not self._givings[stripe]:
            del self._givings[stripe]
            self._pursuit.unasked(stripe)
        self._bell.ring()
        self._news.set()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def __repr__(self) -> str:
        return f"<Sharing {self._pursuit!r}, {len(self._tasks)} transfers>"
