"""One upstream at several URLs: asks the first that works, and goes on at the next when it fails.

Every URL has an ``UpstreamClient`` of its own, so its own origin with its gate and cap, its own
learned challenge, tokens and rule for realms: nothing that one host gave is ever shown to another.
What is the upstream's as a whole stays so: its name, its repositories, its permissions.

A question is asked again at the next URL within the same request, at once: no connection, no answer
in time, or a status of 5xx. A denial or a "not found" is an answer, and so is the wish to be asked
a little later; but a URL that wants to be left alone for longer than ``HASTE`` is left alone, and
the next one is asked. A blob that breaks in the middle is for its flight to go on with; its next
turn goes to the URL that is best by then, at the byte where the last one ended.

At a URL that has another behind it a question is in a *hurry* (``hurry.py``), because who hangs
would eat up the whole patience of the one who waits:

* its answer is due ``HASTE`` seconds after a slot was granted for it, and a trial's after it began;
  sooner where the list is long (``share``);
* it leaves the queue, and is asked elsewhere, as soon as the URL is down or closed while another
  one is not. So what hangs at a URL's few slots does not cost the others their turn, one by one;
* a short question does not wait there for more than ``LONGEST_WAIT``, be the URL well or not,
  because that would be the end of its client's patience.

Each question makes one trial at most while there is a URL that is up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from typing import TypeVar

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    EgressRefused,
    NotFound,
    Throttled,
    TokenServiceFailed,
    UnexpectedAnswer,
    UpstreamDown,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.paths import Kind
from proxy.upstream.blob import BlobSource, Body
from proxy.upstream.client import Head, Page, UpstreamClient
from proxy.upstream.health import SILENT_SECONDS
from proxy.upstream.hurry import HASTE, Hurry, Leisure, MovedOn, share
from proxy.upstream.mirrors import Mirrors, MirrorState
from proxy.upstream.quota import Pulls
from proxy.upstream.routing import Upstream
from proxy.upstream.turns import Ticket, TurnClass

#: Seconds that a short question waits for its turn where there is another URL to ask.
LONGEST_WAIT = 10.0

V = TypeVar("V")

_FAILURES = (UpstreamUnavailable, UpstreamTimeout, TokenServiceFailed, EgressRefused)


def is_failure(error: BaseException) -> bool:
    """Does it say that the URL fails, rather than something about what was asked for?"""
    return isinstance(error, _FAILURES) and not isinstance(error, UnexpectedAnswer)


class MirroredClient:
    """Asks one upstream, at the best of its URLs; the first client is that of its main URL."""

    def __init__(
        self, clients: Sequence[UpstreamClient], mirrors: Mirrors, metrics: Metrics
    ) -> None:
        self._clients = tuple(clients)
        self.mirrors = mirrors
        self._hurries: list[set[Hurry]] = [set() for _ in self._clients]
        self._failovers = metrics.upstream_failovers.labels(self.name)

    @property
    def upstream(self) -> Upstream:
        return self._clients[0].upstream

    @property
    def name(self) -> str:
        return self.upstream.name

    @property
    def label(self) -> str:
        """The origin of its main URL, for metrics."""
        return self._clients[0].origin.key.label

    def is_down(self, repository: str) -> bool:
        """Is it known that no URL answers what is asked about ``repository``?"""
        healths = (client.origin.conduct.health for client in self._clients)
        return all(health.breaker.is_about(repository) for health in healths)

    def wants_probe(self, repository: str) -> bool:
        """May such a question be the one that asks whether one of them is back?"""
        healths = (client.origin.conduct.health for client in self._clients)
        return any(health.would_probe(repository) for health in healths)

    @property
    def pulls(self) -> Pulls:
        """The quota of pulls where the next question goes."""
        return self._clients[self.best(TurnClass.METADATA)].origin.conduct.pulls

    def best(self, turn_class: TurnClass) -> int:
        """The place of the URL that the next question goes to."""
        return self.mirrors.order(self._closed(turn_class))[0]

    def states(self) -> list[MirrorState]:
        """How the URLs stand, for manifests."""
        return self.mirrors.states(self._closed(TurnClass.METADATA))

    async def manifest(
        self, repository: str, reference: str, ticket: Ticket
    ) -> tuple[bytes, str, Digest | None]:
        """As ``UpstreamClient.manifest``."""
        return await self._ask(
            ticket, lambda client: client.manifest(repository, reference, ticket)
        )

    async def head_manifest(
        self, repository: str, reference: str, ticket: Ticket, *, known: Digest | None = None
    ) -> Head:
        """As ``UpstreamClient.head_manifest``."""
        return await self._ask(
            ticket,
            lambda client: client.head_manifest(repository, reference, ticket, known=known),
        )

    async def head_blob(self, repository: str, digest: Digest, ticket: Ticket) -> Head:
        """As ``UpstreamClient.head_blob``."""
        return await self._ask(ticket, lambda client: client.head_blob(repository, digest, ticket))

    async def page(
        self,
        kind: Kind,
        repository: str,
        tail: str,
        query: Sequence[tuple[str, str]],
        ticket: Ticket,
    ) -> Page:
        """As ``UpstreamClient.page``."""
        return await self._ask(
            ticket, lambda client: client.page(kind, repository, tail, query, ticket)
        )

    def blob(self, repository: str, digest: Digest) -> MirroredBlob:
        """A source of the blob's bytes."""
        sources = [BlobSource(client, repository, digest) for client in self._clients]
        return MirroredBlob(sources, self)

    async def _ask(self, ticket: Ticket, question: Callable[[UpstreamClient], Awaitable[V]]) -> V:
        async def ask(place: int, hurry: Leisure) -> V:
            return await question(self._clients[place].within(hurry))

        value, place, began = await self.first(ticket, ask)
        self.mirrors.worked(place, began)
        return value

    async def first(
        self, ticket: Ticket, ask: Callable[[int, Leisure], Awaitable[V]]
    ) -> tuple[V, int, float]:
        """What ``ask`` gives for the first URL that does not fail, that URL's place, and when it
        was asked. ``ask`` gets the place, and how long it may take."""
        loop, left = asyncio.get_running_loop(), set(range(len(self._clients)))
        trials, since = 0, asyncio.get_running_loop().time()
        while True:
            place = self._next(ticket, left, trials)
            left.discard(place)
            trials += not self.mirrors.is_up(place)
            haste = share(loop.time() - since, len(left))
            hurry = self._hurry(place, ticket, frozenset(left), haste)
            began = self.mirrors.begin(place)
            try:
                with self._told(place, hurry):
                    async with hurry.bounded():
                        return await ask(place, hurry), place, began
            except asyncio.CancelledError:
                if hurry.silence >= SILENT_SECONDS:
                    self.mirrors.failed(place, began, "no answer in time")
                raise
            except MovedOn:
                pass
            except (NotFound, Denied):
                self.mirrors.worked(place, began)
                raise
            except UpstreamError as error:
                if not self._goes_on(place, began, error) or not left:
                    raise
            self._failovers.inc()

    def _next(self, ticket: Ticket, left: Collection[int], trials: int) -> int:
        """The best of the URLs that are left; after a trial one that is up, if there is one."""
        order = self.mirrors.order(self._closed(ticket.turn_class))
        places = [place for place in order if place in left]
        return next((place for place in places if trials and self.mirrors.is_up(place)), places[0])

    def _hurry(self, place: int, ticket: Ticket, left: Collection[int], haste: float) -> Leisure:
        """How long a question may take at this URL, when those are left to ask after it."""
        mirrors, is_up = self.mirrors, self.mirrors.is_up(place)

        def ready() -> list[int]:
            closed = self._closed(ticket.turn_class)
            return [one for one in left if one not in closed and mirrors.is_ready(one)]

        if not left or (is_up and not ready()):
            return Leisure()
        label = self._clients[place].origin.key.label

        def leave(waited: float) -> Exception | None:
            if not is_up:  # a trial, or the better one of several that are down
                late = waited >= haste
                return UpstreamTimeout(f"{label}: no turn in {haste:.3g} s") if late else None
            better = ready()
            is_gone = not mirrors.is_ready(place) or place in self._closed(ticket.turn_class)
            is_short = ticket.turn_class is TurnClass.METADATA and waited >= LONGEST_WAIT
            is_late = is_short and any(mirrors.is_up(one) for one in better)
            return MovedOn() if better and (is_gone or is_late) else None

        return Hurry(label, leave, haste=haste)

    @contextlib.contextmanager
    def _told(self, place: int, hurry: Leisure) -> Iterator[None]:
        """What is in a hurry hears when the URL is down."""
        if not isinstance(hurry, Hurry):
            yield
            return
        self._hurries[place].add(hurry)
        try:
            yield
        finally:
            self._hurries[place].discard(hurry)

    def _goes_on(self, place: int, began: float, error: UpstreamError) -> bool:
        """Note a failure; is the question one for the next URL?"""
        if isinstance(error, UpstreamDown):
            goes_on = True  # it was not asked
        elif is_failure(error):
            self.mirrors.failed(place, began, str(error))
            goes_on = True
        else:
            goes_on = isinstance(error, Throttled) and (error.retry_after or 0.0) > HASTE
        if goes_on:
            for hurry in tuple(self._hurries[place]):
                hurry.look()
        return goes_on

    def broke(self, place: int, began: float, error: UpstreamError) -> None:
        """An answer that had begun has failed."""
        self._goes_on(place, began, error)

    def _closed(self, turn_class: TurnClass) -> Mapping[int, float]:
        """The URLs that are not to be asked now, whatever they would answer, and for how many
        seconds: the breaker is open, or the class is paused. One that is well is waited for if it
        is not for long."""
        closed = {}
        for place, client in enumerate(self._clients):
            health, gate = client.origin.conduct.health, client.origin.gate
            paused = gate.paused_for(turn_class)
            if health.is_down and not health.wants_probe:
                closed[place] = max(health.retry_in, paused)
            elif paused > (HASTE if self.mirrors.is_up(place) else 0.0):
                closed[place] = paused
        return closed

    def __repr__(self) -> str:
        return f"<MirroredClient {self.mirrors!r}>"


class MirroredBlob:
    """One digest through one repository of one upstream; a ``BlobSource`` for each URL."""

    def __init__(self, sources: Sequence[BlobSource], client: MirroredClient) -> None:
        self._sources = tuple(sources)
        self._client = client
        self._current = self._sources[0]  # where bytes came from last

    @property
    def key(self) -> tuple[str, str]:
        """The permission this source stands for (D12)."""
        return self._current.key

    @property
    def digest(self) -> Digest:
        return self._current.digest

    @property
    def repository(self) -> str:
        return self._current.repository

    @property
    def ranged(self) -> bool:
        """Has it not yet been seen to ignore Range?"""
        return self._current.ranged

    @property
    def turn_bytes(self) -> int:
        """How much one turn should ask for at this source's speed."""
        return self._current.turn_bytes

    @property
    def active(self) -> int:
        """Turns under way where its bytes come from, whoever's they are."""
        return self._current.active

    @property
    def knows_rate(self) -> bool:
        """Is its speed known?"""
        return self._current.knows_rate

    @property
    def segments(self) -> int:
        """How many turns it may be fetched by at once."""
        return self._current.segments

    @property
    def spare(self) -> int:
        """How many more turns could begin at once where its bytes come from."""
        return self._current.spare

    @property
    def widens(self) -> bool | None:
        """Do several turns bring more than one? None: nobody has tried of late."""
        return self._current.widens

    def learn_widening(self, widens: bool) -> None:
        """Several turns did, or did not, bring more than one."""
        self._current.learn_widening(widens)

    def distrust(self) -> None:
        """As ``BlobSource.distrust``, of every URL that gave bytes: one of them was wrong."""
        for source in self._sources:
            if source.was_used:
                source.distrust()

    @property
    def ahead(self) -> int:
        """Turns waiting at the gate of the URL that would be asked."""
        return self._sources[self._client.best(TurnClass.BLOB)].ahead

    @contextlib.asynccontextmanager
    async def open(self, start: int, length: int | None, ticket: Ticket) -> AsyncIterator[Body]:
        """One turn for ``length`` bytes from ``start`` (``None``: to the end)."""
        async with contextlib.AsyncExitStack() as stack:

            async def enter(place: int, hurry: Leisure) -> Body:
                source = self._sources[place]
                return await stack.enter_async_context(
                    source.open(start, length, ticket, hurry=hurry)
                )

            body, place, began = await self._client.first(ticket, enter)
            self._current = self._sources[place]
            try:
                yield body
            except UpstreamError as error:
                self._client.broke(place, began, error)
                raise
        # Not before its end: one that always breaks would never be marked down for long.
        self._client.mirrors.worked(place, began)

    def __repr__(self) -> str:
        return f"<MirroredBlob {self._current!r}, {len(self._sources)} URLs>"
