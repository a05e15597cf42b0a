"""A pursuit: what one node knows of a blob it wants, and what it should do next.

No clock, no loop, no I/O: its owner tells it what happened (`saw`, `took`, `ended`, `filled`,
`found_wrong`, ...) and asks what to do (`step`). Several actions of one step may run at once, but
one call of the directory after the other; the owner asks again after each event, and after
`Step.wait` seconds it looks.

States of a stripe: lacking -> receiving (of another node) or filling (from the upstream) -> have.
Lacking again when the transfer fails, when another generation has another hash of it, and all of
them when the blob was found wrong. States of the node: following (somebody fills), filler, alone.

* Stripes that are published and can be had of others are taken of them, as many at once as the
  node's line has room for (`traffic.py`).
* Nobody fills and something is to be filled: it asks to become the filler. That is so when stripes
  are yet unpublished, or when published ones are missing: nobody has them any more.
* The filler brings the missing stripes first and then those behind the last published one; it takes
  the others from its peers like everybody else. What it has verified before, under an earlier
  generation that the directory has lost, it publishes again in the name of who did first.
* *Alone*: the directory is gone for longer than `GRACE`, or does not let the node fill though
  nobody else does, or the blob was found wrong too often. Then it goes on with the givers it knows
  and, for what they do not give, with the upstream. It publishes nothing.

Why it always comes to an end. A transfer ends in bytes or in a mark on its giver (`Shunned`), and
while the mark lasts somebody else is asked. A chain of receivers cannot be a ring (`claims.py`), so
some giver at its head has the bytes or fails. A filler that publishes nothing has to make way after
`Terms.stuck`. A blob that is found wrong is dropped and begun anew at most `TRIES` times.
"""

from __future__ import annotations

import random
from dataclasses import replace

from proxy.fleet.claims import ANY_RANK, Giver, Grant, Outcome, Taken, View, Wish
from proxy.fleet.patience import FIRST_LOOK, LONGEST, LOOKERS, MOST_PATIENT, Patience
from proxy.fleet.shunned import Shunned, Why
from proxy.fleet.steps import Ask, Fresh, Step, alone
from proxy.fleet.stripes import (
    PIECE,
    SPAN,
    SPARE_WISHES,
    Span,
    Standing,
    lowest_zero,
    source,
    stripe_count,
    stripe_size,
    to_fill,
    wishes,
)
from proxy.fleet.told import Proof, Told
from proxy.fleet.traffic import WIDTH, Traffic

#: After so many wrong ones the blob's bytes come from the upstream alone.
TRIES = 3
#: A node that takes again and again looks after so many: only then it sees what others have.
LOOK_EACH = 8
#: A directory that is gone for less changes nothing.
GRACE = 2.0


class Pursuit:
    """One node's way to one blob."""

    def __init__(
        self,
        giver: Giver,
        *,
        shunned: Shunned,
        rng: random.Random,
        size: int | None = None,
        traffic: Traffic | None = None,
    ) -> None:
        self._giver = giver
        self._shunned = shunned
        self._traffic = traffic or Traffic()
        self._rng = rng
        self.size: int | None = None
        self.count = 0
        self.have = 0
        self.receiving: dict[int, Grant | Ask] = {}
        self.filling: Span | None = None
        self.is_filler = False
        self.is_proven = False
        self._told = Told()
        self._proofs: dict[int, Proof] = {}
        self._against: dict[int, Proof] = {}
        self._is_refused = False
        self._gone_since: float | None = None
        self._limits: dict[int, int] = {}
        self._order: list[float] = []
        self._lost: frozenset[int] = frozenset()
        self._past: dict[str, dict[int, Proof]] = {}
        self._patience = Patience(rng)
        self._takes = 0  # since the last look
        if size is not None:
            self.sized(size)

    def __repr__(self) -> str:
        role = "fills" if self.is_filler else "follows"
        held = self.have.bit_count()
        return f"<Pursuit {role}: {held} of {self.count}, receives {sorted(self.receiving)}>"

    # What is so.

    @property
    def is_complete(self) -> bool:
        """Whether every stripe is there; whether they make up the digest its owner finds out."""
        return self.count > 0 and self.have == (1 << self.count) - 1

    @property
    def generation(self) -> str:
        return self._told.view.generation

    @property
    def published(self) -> int:
        """How many stripes have a hash in the directory."""
        return self._told.published

    @property
    def announced(self) -> int:
        """What this node has of the stripes published in this generation: what it may lend."""
        return self.have & ((1 << self.published) - 1)

    def rank(self, stripe: int) -> int | None:
        """As a giver: 0: has it; its rank while it is receiving it; None: neither."""
        if self.have >> stripe & 1:
            return 0
        received = self.receiving.get(stripe)
        return received.rank if received else None

    def may_pass_on(self, stripe: int, rank: int) -> bool:
        """As a giver: whether one who asks at that rank may have what is there of the stripe."""
        own = self.rank(stripe)
        return own is not None and own < rank

    def expected(self, stripe: int) -> bytes | None:
        """The stripe's hash, if it was published."""
        proof = self._told.proof(stripe)
        return proof.hash if proof else None

    def giver(self, node: str | None) -> Giver | None:
        """Where this node is, if the last view had it."""
        givers = (holding.giver for holding in self._told.view.holdings)
        return next((giver for giver in givers if giver.node == node), None)

    def is_to_look(self, need: int, now: float) -> bool:
        """After a wait: whether to look. Who has something to take does that: it learns as much by
        it, but for what others have. Who has no room for more, or fills, hears of what concerns it
        when that ends."""
        if not self.generation or self._gone_since is not None or self.generation in self._past:
            return True
        if self._is_occupied:
            return False
        step = self.step(need, now)
        return self.is_stale if step.wishes else not step.saves

    @property
    def is_stale(self) -> bool:
        """Is it long ago that the directory said who has what?"""
        return self._takes >= LOOK_EACH

    @property
    def _is_occupied(self) -> bool:
        """Will something end here before it needs to know more?"""
        coming, fills = len(self.receiving), self.is_filler and self.filling is not None
        end = self.published if fills else self.count
        lacking = (~self.have & (1 << end) - 1).bit_count()
        return not self._room or (lacking <= coming and (coming > 0 or fills))

    @property
    def _room(self) -> int:
        """How many stripes more may be received."""
        return self._traffic.room(self)

    def _note_traffic(self) -> None:
        self._traffic.note(self, len(self.receiving), fills=self.filling is not None)

    def left(self) -> None:
        """Its owner has ended all transfers, for good."""
        self._traffic.forget(self)

    @property
    def is_spared_on(self) -> bool:
        """At the end: was all of the blob published here, so that nobody has to fill it? Then the
        lease is left to run out. Meanwhile this node is the last that is asked for what others have
        too: its uplink goes on to what it alone has, the next layers of the image. A blob of one
        stripe is published only when all of it is here: then nobody else has any of it."""
        return self.is_filler and self.is_proven and self.published == self.count > 1

    def is_alone(self, now: float) -> bool:
        gone = self._gone_since is not None and now - self._gone_since >= GRACE
        return gone or self._is_refused or len(self._past) >= TRIES

    # What happened.

    def sized(self, size: int) -> None:
        """The blob's size is known."""
        if self.size is None:
            self.size = size
            self.count = stripe_count(size)
            self._order = [self._rng.random() for _ in range(self.count)]

    def saw(self, view: View, *, is_news: bool = False) -> bool:
        """A view has come. False: hashes before those in it are not known; look from 0 on."""
        self._gone_since = None
        if view.generation != self.generation:
            if view.first:
                return False
            self._begin(view.generation)
        elif view.first > self.published:
            return False
        known = self.published
        self._told.learn(view, is_wrong=view.generation in self._past)
        for stripe in range(known, self.published):
            proof = self._proofs.get(stripe)
            if proof and proof.hash != self.expected(stripe):
                self._forget(stripe)
        if view.size is not None:
            self.sized(view.size)
        is_news |= self.published > known
        self._patience.learned(is_news=is_news, receiving=len(self.receiving))
        if view.holdings:
            self._takes = 0
        self.is_filler = view.filler == self._giver.node
        if view.filler is not None:
            self._is_refused = False
        return True

    def _begin(self, generation: str) -> None:
        """Another generation. What is there stays until its hash is published, and differs."""
        self._told = Told(View(generation))
        self._lost = frozenset()
        for stripe, received in self.receiving.items():
            if isinstance(received, Grant):
                self.receiving[stripe] = replace(received, generation=generation)

    def _forget(self, stripe: int) -> None:
        self.have &= ~(1 << stripe)
        self._told.have &= ~(1 << stripe)
        del self._proofs[stripe]

    def took(self, taken: Taken) -> bool:
        """Grants have come, and a view; those of another generation than that are none. False: as
        in `saw`, and nothing was taken: it is to be told again with the view from 0 on."""
        if not self.saw(taken.view, is_news=bool(taken.grants)):
            return False
        self._takes += 1
        for grant in taken.grants:
            if grant.generation == self.generation:
                self._receive(grant)
        self._lost = taken.missing
        return True

    def _receive(self, received: Grant | Ask) -> None:
        stripe = received.stripe
        self.receiving[stripe] = received
        self._note_traffic()
        self._limits[stripe] = min(received.rank, self._limits.get(stripe, ANY_RANK))
        proof = self._told.proof(stripe)
        if proof is not None:
            self._against[stripe] = proof

    def asked(self, ask: Ask) -> None:
        """One of a step's `asks` is under way."""
        self._receive(ask)

    def ended(self, stripe: int, why: Why | None, now: float) -> Outcome:
        """A stripe's transfer has ended: well (None), or in that way. What its grant ended as."""
        giver = self.receiving.pop(stripe).giver.node
        self._note_traffic()
        proof = self._against.pop(stripe, None)
        if why is not None:
            self._shunned.mark(giver, why, now)
            return why.outcome
        self._shunned.praise(giver)
        if proof is None or self.expected(stripe) not in (None, proof.hash):
            return Outcome.FAILED  # bytes of an earlier generation
        self.have |= 1 << stripe
        self._told.have |= self.announced & 1 << stripe
        self._proofs[stripe] = proof
        return Outcome.DONE

    def unasked(self, stripe: int) -> None:
        """Nobody receives the stripe from this node any more: it may have any rank again."""
        self._limits.pop(stripe, None)

    def held(self) -> None:
        """The directory was told what this node has."""
        self._told.have = self.announced

    def led(self, filler: str | None) -> None:
        """The answer of `Claims.fill`."""
        self.is_filler = filler == self._giver.node
        self._is_refused = filler is None
        self._told.view = replace(self._told.view, filler=filler)

    def gave_up(self) -> None:
        """Another one may fill now. What was begun goes on, unless one does."""
        self.is_filler = False
        self._told.view = replace(self._told.view, filler=None)

    def begun(self, span: Span) -> None:
        """These stripes are on their way from the upstream."""
        self.filling = span
        self._note_traffic()

    def filled(self, stripe: int, found: bytes) -> bool:
        """The next stripe of the span is there. False: it is not what was published.

        Then a node that stood in for the upstream has lied (`fill_ended`), or, if the upstream
        itself brought it, the generation is wrong (`found_wrong`).
        """
        published = self._told.proof(stripe)
        if published is not None and published.hash != found:
            return False
        stood_in = self.filling.of if self.filling is not None else None
        # Who stood in for the upstream answers for what is published on its word.
        self._proofs[stripe] = published or Proof(found, stood_in or self._giver.node)
        self.have |= 1 << stripe
        self._lost -= {stripe}
        if self.filling is not None:
            rest = replace(self.filling, first=stripe + 1)
            self.filling = rest if rest.first < rest.last else None
            self._note_traffic()
        return True

    def fill_ended(self, why: Why | None, now: float) -> None:
        """The span is no longer on its way; a node that stood in for the upstream failed so."""
        if self.filling is not None and self.filling.of is not None and why is not None:
            self._shunned.mark(self.filling.of, why, now)
        self.filling = None
        self._note_traffic()

    def was_published(self, fresh: Fresh, count: int | None) -> None:
        """The answer of `Claims.publish`."""
        if count is None:
            self.is_filler = False
            return
        self._told.entered(fresh, count)
        self._told.have = self.announced

    def answered(self, seconds: float, now: float) -> None:
        """The directory took so long for a call."""
        self._patience.answered(seconds, self._told.view.nodes, now)

    def directory_gone(self, now: float) -> None:
        """The directory does not answer; a view ends that."""
        if self._gone_since is None:
            self._gone_since = now

    def found_wrong(self) -> None:
        """The stripes did not make up the digest. The owner ends all transfers of the blob."""
        self._past[self.generation] = self._proofs
        self._proofs, self._against, self.have = {}, {}, 0
        self.filling = None
        self._note_traffic()
        self.is_filler = False
        self._told = Told(View(self.generation))

    def found_right(self, now: float) -> frozenset[str]:
        """The digest is right. Shuns, and returns, those who published other hashes before."""
        self.is_proven = True
        liars = {
            said.by
            for past in self._past.values()
            for stripe, said in past.items()
            if said.hash != self._proofs[stripe].hash and said.by != self._giver.node
        }
        for liar in liars:
            self._shunned.mark(liar, Why.LIED, now)
        return frozenset(liars)

    # What to do.

    def step(self, need: int, now: float) -> Step:
        """What to do now, for readers that wait for the stripe `need`."""
        drop = self.generation if self.generation in self._past else None
        if self.is_complete:
            return Step(drop, publish=self._fresh(), hold=self._is_untold)
        standing = self._standing(need, now)
        if self.is_alone(now):
            step = alone(standing, self._told.view, is_filling=self.filling is not None)
            return replace(step, drop=drop, wait=self._wait(now))
        if drop is not None:
            return Step(drop, wait=0.0)
        if self._gone_since is not None:
            return Step(wait=self._wait(now))
        filler = self._told.view.filler
        fill = None
        if self.is_filler and self.filling is None:
            fill = to_fill(standing, self.published, self._lost, source(standing, self._told.view))
        saves = self._is_saving(standing, now)
        return Step(
            lead=filler is None and self._is_to_fill,
            publish=self._fresh(),
            hold=self._is_untold,
            wishes=self._wishes(standing) if not saves else (),
            room=standing.room,
            avoid=self._shunned.distrusted(now),
            fill=Span(0, 1) if self.is_filler and not self.count and not self.filling else fill,
            stop=self._is_done_by_another,
            saves=saves,
            wait=self._wait(now),
        )

    def _is_saving(self, standing: Standing, now: float) -> bool:
        """Is the directory asked for nothing now? It would have no time for each stripe of a crowd
        by itself: then it is asked for several at once, while others are on their way."""
        if not self._patience.is_over(now):
            return True
        if standing.need < self.published and standing.lacks(standing.need):
            return False  # readers wait for it
        batch = min(WIDTH // 2, 1 + self._told.view.nodes // LOOKERS)
        return bool(self.receiving) and standing.room < batch

    def _wishes(self, standing: Standing) -> tuple[Wish, ...]:
        ahead = 0 if self.is_filler else SPARE_WISHES
        return wishes(standing, self._told.view, ahead) if self.count else ()

    @property
    def _is_to_fill(self) -> bool:
        return not self.count or self.published < self.count or bool(self._lost)

    @property
    def _is_done_by_another(self) -> bool:
        """Does another node fill, or has one filled, what is on its way here?"""
        if self.filling is None or self.is_filler:
            return False
        return self._told.view.filler is not None or self.filling.first < self.published

    @property
    def _is_untold(self) -> bool:
        return bool(self.announced & ~self._told.have)

    def _fresh(self) -> Fresh | None:
        """What the filler has to publish: what follows, the last only when the digest is right."""
        if not self.is_filler:
            return None
        end = self.published + lowest_zero(self.have >> self.published)
        end = min(end, self.count if self.is_proven else self.count - 1)
        proofs = [self._proofs[stripe] for stripe in range(self.published, end)]
        if not proofs:
            return None
        return Fresh(self.published, tuple(p.hash for p in proofs), tuple(p.by for p in proofs))

    def _standing(self, need: int, now: float) -> Standing:
        busy = set(self.receiving)
        if self.filling is not None:
            busy.update(range(self.filling.first, self.filling.last))
        return Standing(
            zone=self._giver.zone,
            have=self.have,
            count=self.count,
            busy=busy,
            room=self._room,
            limits=self._limits,
            order=self._order,
            need=need,
            hop=PIECE / stripe_size(self.size) if self.size else 1.0,
            span=SPAN // stripe_size(self.size) if self.size else 1,
            avoid=self._shunned.avoided(now),
        )

    def _wait(self, now: float) -> float:
        """Seconds until it asks again, if nothing happens. If something has to, until it looks
        whether leases have to be renewed. Bytes that another node may fill as well are on their way
        while it does not know."""
        nodes = self._told.view.nodes
        is_doubled = self.filling is not None and not self.is_filler
        if is_doubled and self._gone_since is None and not self.is_alone(now):
            return min(MOST_PATIENT, FIRST_LOOK * max(1.0, nodes / LOOKERS))
        if self._is_occupied and self._gone_since is None:
            return MOST_PATIENT
        return min(self._patience.wait(nodes, now), MOST_PATIENT if self.is_filler else LONGEST)
