"""One upstream: requests with its credentials, over its origin's gate (DESIGN D1, D4, D8, D20).

A request is one turn: the gate grants a slot, the token is fetched inside that turn if it comes
from the same origin and before it if from another one (``login.py``), the answer is read under it.
Redirects are followed by hand: each hop takes a turn of the origin it leads to, after the previous
turn has ended; Authorization never crosses an origin, nor is it sent again once another origin had
a say in where we go; https never leads to http, and nobody leads to an address nearer to us than
their own (``reach.py``).

What reaches the layers above are value types and ``PullError``s, never aiohttp's objects.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlencode

import aiohttp
from yarl import URL

from proxy.observe.metrics import Metrics
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    Denied,
    DigestInvalid,
    EgressFailed,
    RedirectRefused,
    UpstreamUnavailable,
)
from proxy.oci.manifest import MANIFEST_ACCEPT, MAX_MANIFEST
from proxy.oci.paths import Kind
from proxy.oci.ranges import parse_content_range
from proxy.throttle import Stream, Throttle
from proxy.upstream.endpoint import OriginKey, OriginSettings
from proxy.upstream.errors import refusal, translated
from proxy.upstream.hosts import HostPattern
from proxy.upstream.hurry import Leisure
from proxy.upstream.login import Login, Question
from proxy.upstream.origin import Origin, Turn
from proxy.upstream.origins import Origins
from proxy.upstream.reach import ANYWHERE, Reach, allowing
from proxy.upstream.reply import Reply, drain, next_hop, read_bounded
from proxy.upstream.routing import Upstream
from proxy.upstream.signs import BUSY
from proxy.upstream.tokens import Authenticator
from proxy.upstream.turns import Ticket, TurnClass

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
MAX_LISTING = 8 << 20
#: Refusals of a HEAD that say nothing about a GET: ECR Public answers 401 where it grants a GET
#: (distribution#4383), URLs are signed for one method, some services do not know HEAD.
_HEAD_REFUSALS = frozenset({400, 401, 403, 405, 501})
#: Failures of a connection that speak of load, and those among them that do not: the name, TLS.
_BROKEN = (aiohttp.ClientConnectionError, OSError)
_GONE = (aiohttp.ClientConnectorDNSError, aiohttp.ClientSSLError, TimeoutError)


@dataclass(frozen=True, slots=True)
class Head:
    """What an upstream says of a manifest or blob without its bytes."""

    digest: Digest | None
    media_type: str | None
    size: int | None
    not_modified: bool = False


@dataclass(frozen=True, slots=True)
class Page:
    """A listing's page: its bytes as they came, and the headers that matter."""

    body: bytes
    media_type: str
    link: str | None
    filters: str | None


class UpstreamClient:
    """Asks one upstream at one URL. Shared by all requests to it.

    ``redirect_hosts`` may be led to whatever their address is. ``segments``: how many turns
    a blob may take at once.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        origin: Origin,
        origins: Origins,
        redirect_settings: OriginSettings,
        authenticator: Authenticator,
        metrics: Metrics,
        throttle: Throttle | None = None,
        redirect_hosts: Sequence[HostPattern] = (),
        segments: int = 1,
    ) -> None:
        self.upstream = upstream
        self.segments = segments
        self.origin = origin
        self.metrics = metrics
        self._origins = origins
        self._redirect_settings = redirect_settings
        self._authenticator = authenticator
        self._throttle = throttle
        self._base = URL(upstream.url.rstrip("/"), encoded=True)
        self._reach = allowing(redirect_hosts)
        self._hurry = Leisure()

    @property
    def name(self) -> str:
        return self.upstream.name

    def within(self, hurry: Leisure) -> Self:
        """The same client for one question, which takes no longer than ``hurry`` says."""
        other = copy.copy(self)
        other._hurry = hurry
        return other

    def url(self, repository: str, tail: str, query: str = "") -> URL:
        """The upstream's URL of ``tail`` (``blobs/sha256:…``) in ``repository``."""
        text = f"{self._base}/v2/{repository}/{tail}"
        return URL(f"{text}?{query}" if query else text, encoded=True)

    async def manifest(
        self, repository: str, reference: str, ticket: Ticket
    ) -> tuple[bytes, str, Digest | None]:
        """GET a manifest: its bytes, media type and the digest the upstream claims for it.

        Such a GET is a pull to Docker Hub's quota, so it may have to wait for its place.
        """
        await self.origin.conduct.pulls.place()
        url = self.url(repository, f"manifests/{reference}")
        headers = {"Accept": MANIFEST_ACCEPT}
        async with self.exchange("GET", url, repository, ticket, headers) as reply:
            self._expect(reply, 200, Kind.MANIFEST, f"manifest {repository}:{reference}")
            body = await read_bounded(reply, MAX_MANIFEST, "a manifest")
            media_type = _media_type(reply.headers)
            return body, media_type, claimed_digest(reply.headers)

    async def head_manifest(
        self, repository: str, reference: str, ticket: Ticket, *, known: Digest | None = None
    ) -> Head:
        """HEAD a manifest; with ``known`` the upstream may answer that nothing has changed."""
        url = self.url(repository, f"manifests/{reference}")
        headers = {"Accept": MANIFEST_ACCEPT}
        if known is not None:
            headers["If-None-Match"] = f'"{known}"'
        async with self.exchange("HEAD", url, repository, ticket, headers) as reply:
            if reply.status == 304 and known is not None:
                return Head(known, None, None, not_modified=True)
            self._expect(reply, 200, Kind.MANIFEST, f"manifest {repository}:{reference}")
            return _head(reply)

    async def head_blob(self, repository: str, digest: Digest, ticket: Ticket) -> Head:
        """Does the upstream have this blob through this repository, and how large is it?

        A HEAD that is refused is asked again as a GET of one byte.
        """
        url = self.url(repository, f"blobs/{digest}")
        name = f"blob {digest} in {repository}"
        with contextlib.suppress(Denied):
            async with self.exchange("HEAD", url, repository, ticket, {}) as reply:
                if reply.status not in _HEAD_REFUSALS:
                    self._expect(reply, 200, Kind.BLOB, name)
                    return _head(reply)
        headers = {"Range": "bytes=0-0"}
        async with self.exchange("GET", url, repository, ticket, headers) as reply:
            if reply.status == 416:  # an empty blob has no first byte
                return Head(digest, None, 0)
            if reply.status == 206:
                span = parse_content_range(reply.headers.get("Content-Range", ""))
                await drain(reply.response)
                return Head(digest, None, span.size if span is not None else None)
            self._expect(reply, 200, Kind.BLOB, name)
            return _head(reply)

    async def page(
        self,
        kind: Kind,
        repository: str,
        tail: str,
        query: Sequence[tuple[str, str]],
        ticket: Ticket,
    ) -> Page:
        """GET a listing (tags, referrers)."""
        url = self.url(repository, tail, urlencode(query))
        async with self.exchange("GET", url, repository, ticket, {}) as reply:
            self._expect(reply, 200, kind, f"{tail} of {repository}")
            body = await read_bounded(reply, MAX_LISTING, "a listing")
            headers = reply.headers
            return Page(
                body,
                headers.get("Content-Type", "application/json"),
                headers.get("Link"),
                headers.get("OCI-Filters-Applied"),
            )

    @contextlib.asynccontextmanager
    async def exchange(
        self,
        method: str,
        url: URL,
        repository: str,
        ticket: Ticket,
        headers: Mapping[str, str],
        *,
        reach: Reach | None = None,
    ) -> AsyncIterator[Reply]:
        """Ask, with authorisation and redirects; the reply's turn lasts as long as the block.

        ``reach`` is that of the earlier reply that led to ``url``, if one did. A body with a
        Content-Encoding is refused: identity was asked for, and the digest is over the bytes as
        they are.
        """
        self._hurry.waits()
        reach = self._reach if reach is None else reach
        is_ours = True  # no other origin had a say yet
        for _ in range(MAX_REDIRECTS + 1):
            origin = await self._origin_of(url)
            is_ours = is_ours and origin is self.origin
            login = self._login(method, url, headers, repository) if is_ours else None
            response = None
            while response is None:
                async with (login or origin).turn(ticket, repository) as turn:
                    self._hurry.asked(turn)
                    with self._weighed(turn), translated(origin.key.label, self.metrics):
                        if login is not None:
                            response = await login.send(turn)
                        else:
                            hop = ANYWHERE if origin is self.origin else reach
                            response = await turn.request(method, url, headers, reach=hop)
                        if response is None:
                            continue
                        if response.status in REDIRECTS:
                            await drain(response)
                    reach = reach.after(turn.peer)
                    self._weigh(turn, response)
                    if response.status not in REDIRECTS:
                        _expect_identity(origin, response)
                        self._hurry.answered()
                        yield Reply(response, turn, url, self.metrics, reach, self._stream(ticket))
                        return
            url = next_hop(url, response.headers.get("Location", ""))
        raise RedirectRefused(f"{self.name}: more than {MAX_REDIRECTS} redirects")

    def _login(self, method: str, url: URL, headers: Mapping[str, str], repository: str) -> Login:
        return Login(
            Question(method, url, headers, repository),
            name=self.name,
            origin=self.origin,
            authenticator=self._authenticator,
            origin_of=self._origin_of,
            metrics=self.metrics,
            reach=self._reach,
            hurry=self._hurry,
        )

    def _stream(self, ticket: Ticket) -> Stream | None:
        if self._throttle is None:
            return None
        return self._throttle.stream(prompt=ticket.turn_class is TurnClass.METADATA)

    @contextlib.contextmanager
    def _weighed(self, turn: Turn) -> Iterator[None]:
        """A connection that is refused, or broken before there is an answer, is one too many."""
        try:
            yield
        except EgressFailed:
            raise  # says nothing of the upstream
        except UpstreamUnavailable as error:
            if isinstance(error.__cause__, _BROKEN) and not isinstance(error.__cause__, _GONE):
                turn.was_too_much("connection refused or reset")
            raise

    def _weigh(self, turn: Turn, response: aiohttp.ClientResponse) -> None:
        """What an answer says of the load: 5xx and 429 that it is too much, others that it is not.

        Docker Hub's 429 is about a quota of manifests, so none of a manifest counts (D6).
        """
        if response.status in BUSY:
            turn.was_too_much(f"status {response.status}")
        elif response.status == 429:
            if "/manifests/" not in response.url.raw_path:
                turn.was_too_much("status 429")
        else:
            turn.was_answered(well=response.status < 400)

    async def _origin_of(self, url: URL) -> Origin:
        if OriginKey.of(url) == self.origin.key:
            return self.origin
        origin = await self._origins.foreign(url, self._redirect_settings)
        theirs, ours = origin.settings, self.origin.settings
        # Another upstream's, which knows us by our certificate: what it shows us is not for those
        # who read this one.
        if theirs.shows_certificate and theirs.tls is not ours.tls:
            raise RedirectRefused(
                f"{self.name} leads to {origin.key.label}, which gets a client certificate of ours"
            )
        return origin

    def _expect(self, reply: Reply, status: int, kind: Kind, name: str) -> None:
        if reply.status != status:
            raise refusal(self.name, reply.status, reply.headers, kind, name)

    def __repr__(self) -> str:
        return f"<UpstreamClient {self.name} {self.origin!r}>"


def claimed_digest(headers: Mapping[str, str]) -> Digest | None:
    """The upstream's ``Docker-Content-Digest``, if it is one that can be checked."""
    try:
        return Digest.parse(headers.get("Docker-Content-Digest", ""))
    except DigestInvalid:
        return None


def _head(reply: Reply) -> Head:
    return Head(
        claimed_digest(reply.headers),
        _media_type(reply.headers),
        reply.response.content_length if _is_identity(reply.headers) else None,
    )


def _media_type(headers: Mapping[str, str]) -> str:
    return headers.get("Content-Type", "").partition(";")[0].strip()


def _is_identity(headers: Mapping[str, str]) -> bool:
    return headers.get("Content-Encoding", "").strip().lower() in ("", "identity")


def _expect_identity(origin: Origin, response: aiohttp.ClientResponse) -> None:
    if response.method == "HEAD" or response.status not in (200, 206):
        return  # no body, or one that is not handed on
    if not _is_identity(response.headers):
        encoding = response.headers.get("Content-Encoding", "")[:40]
        raise UpstreamUnavailable(
            f"{origin.key.label}: identity was asked for, the body came as {encoding!r}"
        )
