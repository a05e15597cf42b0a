"""One upstream at several URLs: asks the first that works, and goes on at the next when it fails.

Every URL has an ``UpstreamClient`` of its own, so its own origin with its gate and cap, its own
learned challenge, tokens and rule for realms: nothing that one host gave is ever shown to another.
What is the upstream's as a whole stays so: its name, its repositories, its permissions.

A question is asked again at the next URL within the same request, at once: no connection, no answer
in time, or a status of 5xx. A denial or a "not found" is an answer, and so is the wish to be asked
later. A blob that breaks in the middle is for its flight to go on with; its next turn goes to the
URL that is best by then, at the byte where the last one ended.

A URL that has another behind it gets ``HASTE`` seconds for the head of its answer, because who
hangs would eat up the whole patience of the one who waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    NotFound,
    TokenServiceFailed,
    UnexpectedAnswer,
    UpstreamError,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from proxy.oci.paths import Kind
from proxy.upstream.blob import BlobSource, Body
from proxy.upstream.client import Head, Page, UpstreamClient
from proxy.upstream.mirrors import Mirrors
from proxy.upstream.quota import Pulls
from proxy.upstream.routing import Upstream
from proxy.upstream.turns import Ticket

#: Seconds for the head of an answer where there is another URL to ask.
HASTE = 5.0

V = TypeVar("V")

_FAILURES = (UpstreamUnavailable, UpstreamTimeout, TokenServiceFailed)


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

    @property
    def is_down(self) -> bool:
        """Is it known that no URL answers?"""
        return all(client.origin.conduct.health.is_down for client in self._clients)

    @property
    def wants_probe(self) -> bool:
        """Is it time to ask whether one of them is back?"""
        return any(client.origin.conduct.health.wants_probe for client in self._clients)

    @property
    def pulls(self) -> Pulls:
        """The quota of pulls where the next question goes."""
        place, _ = self.mirrors.order()[0]
        return self._clients[place].origin.conduct.pulls

    async def manifest(
        self, repository: str, reference: str, ticket: Ticket
    ) -> tuple[bytes, str, Digest | None]:
        """As ``UpstreamClient.manifest``."""
        return await self._ask(lambda client: client.manifest(repository, reference, ticket))

    async def head_manifest(
        self, repository: str, reference: str, ticket: Ticket, *, known: Digest | None = None
    ) -> Head:
        """As ``UpstreamClient.head_manifest``."""
        return await self._ask(
            lambda client: client.head_manifest(repository, reference, ticket, known=known)
        )

    async def head_blob(self, repository: str, digest: Digest, ticket: Ticket) -> Head:
        """As ``UpstreamClient.head_blob``."""
        return await self._ask(lambda client: client.head_blob(repository, digest, ticket))

    async def page(
        self,
        kind: Kind,
        repository: str,
        tail: str,
        query: Sequence[tuple[str, str]],
        ticket: Ticket,
    ) -> Page:
        """As ``UpstreamClient.page``."""
        return await self._ask(lambda client: client.page(kind, repository, tail, query, ticket))

    def blob(self, repository: str, digest: Digest) -> MirroredBlob:
        """A source of the blob's bytes."""
        sources = [BlobSource(client, repository, digest) for client in self._clients]
        return MirroredBlob(sources, self)

    async def _ask(self, question: Callable[[UpstreamClient], Awaitable[V]]) -> V:
        async def ask(place: int, haste: float | None) -> V:
            client = self._clients[place]
            return await question(client if haste is None else client.hasty(haste))

        value, place, began = await self.first(ask)
        self.mirrors.worked(place, began)
        return value

    async def first(self, ask: Callable[[int, float | None], Awaitable[V]]) -> tuple[V, int, float]:
        """What ``ask`` gives for the first URL that does not fail, that URL's place, and when it
        was asked. ``ask`` gets the place, and how many seconds it may wait (``None``: as usual)."""
        order = self.mirrors.order()
        for n, (place, is_last_hope) in enumerate(order, start=1):
            began = self.mirrors.begin(place)
            try:
                return await ask(place, None if is_last_hope else HASTE), place, began
            except (NotFound, Denied):
                self.mirrors.worked(place, began)
                raise
            except UpstreamError as error:
                if not is_failure(error):
                    raise
                self.mirrors.failed(place, began, str(error))
                if n == len(order):
                    raise
                self._failovers.inc()
        raise AssertionError("an upstream has a URL")

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
    def ahead(self) -> int:
        """Turns waiting at the gate of the URL that would be asked."""
        place, _ = self._client.mirrors.order()[0]
        return self._sources[place].ahead

    @contextlib.asynccontextmanager
    async def open(self, start: int, length: int | None, ticket: Ticket) -> AsyncIterator[Body]:
        """One turn for ``length`` bytes from ``start`` (``None``: to the end)."""
        async with contextlib.AsyncExitStack() as stack:

            async def enter(place: int, haste: float | None) -> Body:
                source = self._sources[place]
                return await stack.enter_async_context(
                    source.open(start, length, ticket, patience=haste)
                )

            body, place, began = await self._client.first(enter)
            self._current = self._sources[place]
            try:
                yield body
            except UpstreamError as error:
                if is_failure(error):
                    self._client.mirrors.failed(place, began, str(error))
                raise
        # Not before its end: one that always breaks would never be marked down for long.
        self._client.mirrors.worked(place, began)

    def __repr__(self) -> str:
        return f"<MirroredBlob {self._current!r}, {len(self._sources)} URLs>"
