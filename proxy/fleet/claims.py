"""Claims: who has or fills which stripes of a blob, and who may ask whom for one.

Theory of operation. Of each blob the directory keeps, all with an end by its own clock:

* the *filler*: the one node that takes the blob's bytes from the upstream. A lease that its
  progress renews; when it lapses or is settled, the first to ask becomes the next, and goes on
  behind the last published stripe. It publishes each stripe's hash once it has the stripe, the last
  one only after the whole digest was right: an honest filler never publishes a whole wrong blob.
  One that renews but publishes nothing for long makes way too, and may not be the next one.
  Who receives of it and sees it die says so, and then its lease is short (`Terms.doubted`). One
  that lives renews in time whoever says what. Were it late, two nodes would fill for a moment: that
  costs bytes, and nothing else rests on there being one. One that has published all of a blob lets
  its lease run out: until then it is asked last, since it may be filling the image's next layers.
* *holdings*: which stripes a node has verified. Those of a part are short-lived and renewed by
  whatever their node does; those of a whole blob live long, at most `Terms.wholes` of them.
* *grants*: the right to receive one stripe of one giver. Taking one is atomic: the giver has the
  stripe, or receives it itself, and lends less than `Terms.most` stripes of this blob and this one
  less than `Terms.each` times: who has a new stripe first gives it to few, and they to others.
  Whom to ask is chosen here, since only here it is known who lends what now. The filler is asked
  for what nobody else can give: each byte of its uplink that brings somebody a stripe which others
  have, too, is one that a stripe which nobody has waits for, and so does the whole crowd.

A giver may pass on a stripe that it is still receiving. Who receives a stripe has a *rank* for it:
1 from a giver that has it verified, else one more than the giver's. A node's rank for a stripe
never grows while others may be receiving it from that node: who asks for a stripe again asks with
its old rank as `Wish.limit`, or ends what it passes on first. And a giver serves what it is still
receiving only to whoever names a greater rank than its own at that moment. So ranks grow along
every chain of receivers, and none can close into a ring, whatever the directory lost, forgot or
told too late.

Everything published or verified belongs to a *generation* of its blob. It ends when somebody finds
that the stripes did not make up the digest (`drop`), and when the directory has lost it all. News
of an earlier generation is refused, so that nobody is taken for a liar on account of old stripes.

The directory holds no bytes and no trust. What it says is a hint: hashes are checked on receiving,
the digest at the end. Without it (`DirectoryDown`) callers go on with the givers that they know.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from proxy.oci.digest import Digest

#: `have` of a node that has the whole blob.
WHOLE = -1

#: A limit on ranks that limits nothing: no chain of receivers is as long.
ANY_RANK = 1 << 30


@dataclass(frozen=True, slots=True)
class Giver:
    """A node as those see it that may ask it for stripes."""

    node: str  # 16 hex digits, new whenever its process begins to lead
    name: str
    zone: str
    url: str


@dataclass(frozen=True, slots=True)
class Holding:
    """What a node has of a blob: `have` is a mask of verified stripes (bit n: stripe n), or WHOLE.

    `receiving`: its rank for each stripe that it is receiving from others now. `lending`: grants
    out on it for this blob.
    """

    giver: Giver
    have: int
    receiving: Mapping[int, int] = field(default_factory=dict)
    lending: int = 0

    def has(self, stripe: int) -> bool:
        return bool(self.have >> stripe & 1)

    def rank(self, stripe: int) -> int | None:
        """0: has it; its rank if it is receiving it; else None."""
        return 0 if self.has(stripe) else self.receiving.get(stripe)


@dataclass(frozen=True, slots=True)
class View:
    """What the directory knows of a blob.

    `hashes`: of the stripes published so far from `first` on, in order, and who published each in
    `publishers`. `filler`: a node id, or None: nobody is. `holdings`: not all in a large fleet, but
    the filler's, some of the asking node's zone and some of any, never its own; `nodes`: how many
    there are in all.
    """

    generation: str = ""
    size: int | None = None
    first: int = 0
    hashes: tuple[bytes, ...] = ()
    publishers: tuple[str, ...] = ()
    filler: str | None = None
    holdings: tuple[Holding, ...] = ()
    nodes: int = 0

    @property
    def published(self) -> int:
        """How many stripes have a hash."""
        return self.first + len(self.hashes)


@dataclass(frozen=True, slots=True)
class Wish:
    """A stripe, to be had at a rank of at most `limit`."""

    stripe: int
    limit: int = ANY_RANK
    is_urgent: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to receive a stripe of a giver, and the rank at which it is received."""

    digest: Digest
    generation: str
    stripe: int
    giver: Giver
    rank: int
    token: str


@dataclass(frozen=True, slots=True)
class Taken:
    """`missing`: wished stripes that no node has or is receiving; `view`: as it was then, but
    without the holdings, which would cost the directory more than all the rest."""

    grants: tuple[Grant, ...]
    missing: frozenset[int]
    view: View


class Outcome(enum.Enum):
    """How a grant ended. DONE tells the directory that its taker has the stripe, DIED that a filler
    may be no more; the others nothing."""

    DONE = "done"
    DIED = "died"  # the giver did, or stalled
    FAILED = "failed"  # the giver was busy or has it not, or nobody wants the stripe any more
    LIED = "lied"  # the bytes were not those of the stripe's hash


@dataclass(frozen=True, slots=True)
class Terms:
    """How long entries live without news (seconds), and how many there may be.

    Whoever holds a part or receives renews it at least every third of that time: a directory that
    is late may take two calls of some seconds in between. A filler renews more often (`renewal`),
    since one that is `doubted` has no more time than that to show that it lives.
    """

    filler: float = 10.0
    doubted: float = 3.0  # what is left of that for a filler of which a taker says that it died
    grant: float = 15.0
    part: float = 60.0
    whole: float = 1800.0
    stuck: float = 120.0  # a filler that publishes nothing for so long has to make way
    ban: float = 600.0  # from filling a blob, after publishing wrong hashes of it
    most: int = 6  # grants out on a giver for one blob
    each: int = 2  # of these, for one stripe
    filler_most: int = 6  # the same for the filler: as many as fill its uplink
    filler_each: int = 1
    wholes: int = 64  # nodes listed for having the whole blob
    sample: int = 12  # holdings in a view

    @property
    def renewal(self) -> float:
        """The longest time between two calls of a filler."""
        return min(self.filler / 4, self.doubted / 3)


class Claims(Protocol):
    """One node's access to the directory of stripes. All methods may raise DirectoryDown."""

    async def look(self, digest: Digest, known: int = 0) -> View:
        """What there is, with hashes from stripe `known` on."""

    async def fill(self, digest: Digest, size: int | None) -> str | None:
        """Become the filler, or stay it for another while; returns which node is the filler now.

        None: nobody, and this node may not (it is banned, or had to make way).
        """

    async def publish(
        self,
        digest: Digest,
        size: int,
        first: int,
        hashes: Sequence[bytes],
        by: Sequence[str] = (),
    ) -> int | None:
        """As the filler: enter hashes from stripe `first` on; renews as `fill` does.

        Returns how many stripes are published now: less than expected means that the directory has
        lost earlier ones, which must be published again; more, that another one has filled
        meanwhile, and none of these were entered. `by` names who published them first. None:
        no longer the filler.
        """

    async def settle(self, digest: Digest) -> None:
        """As the filler: give that up (done, failed, cancelled); another may begin at once."""

    async def take(
        self,
        digest: Digest,
        wishes: Sequence[Wish],
        room: int,
        known: int = 0,
        avoid: Collection[str] = (),
        ended: Sequence[tuple[Grant, Outcome]] = (),
    ) -> Taken:
        """Grants for the first of the wishes that can be had now, `room` of them at most.

        Urgent ones come first, then those that fewest nodes have or receive. The giver is one of
        the own zone, if any of some has room, else of another; of some that could be it the one
        that lends least and is nearest to a node that has all of the stripe; the filler only when
        nobody else can give it.
        Nothing is granted of nodes to `avoid`; a stripe that only those have is missing. One that
        is not published yet may be wished, but is neither granted nor missing. Before all that the
        grants in `ended` are given back.
        """

    async def give_back(self, grant: Grant, outcome: Outcome) -> None:
        """The grant has ended. Giving it back twice, or late, does nothing, but that each DIED of
        the filler shortens its lease until it renews that."""

    async def hold(
        self, digest: Digest, generation: str, have: int, grants: Sequence[Grant] = ()
    ) -> bool:
        """Enter or renew what this node has, and the grants that it uses.

        False: not entered, since the generation is another by now, or, for WHOLE, since enough
        others are listed.
        """

    async def withdraw(self, digest: Digest) -> None:
        """This node has it no more."""

    async def drop(self, digest: Digest, generation: str) -> None:
        """The stripes of this generation did not make up the digest: forget them.

        Who published them, other than the caller, may not fill this blob for a while. A later
        generation is left alone.
        """
