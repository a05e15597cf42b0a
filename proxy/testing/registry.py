"""An OCI registry in this process, with a connection limit, logins, a CDN, and scripted faults.

Life of a request: it arrives and is counted; on a socket beyond the limit it is refused and the
socket closed, as Harbor does; with too many in progress it may get what an overloaded Harbor gives
(`proxy.testing.overload`); then the latency passes; then the door (Basic or Bearer) lets it in or
challenges it; then it waits in the holds that match; then a scripted fault may strike; then it is
answered. Everything runs on the event loop that entered the context manager, and everything has
ended when that is left.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Literal, Self
from urllib.parse import parse_qsl

from aiohttp import web

from proxy.oci.digest import Digest
from proxy.testing.answers import Manners, answer, meant_digest
from proxy.testing.content import Content
from proxy.testing.counters import Counters, Seen
from proxy.testing.faults import (
    Action,
    Disconnect,
    EmptyAccess,
    Fault,
    Hang,
    IgnoreRange,
    Script,
    check_kind,
    distort,
    matches,
)
from proxy.testing.holds import Hold, Parking
from proxy.testing.images import FakeImage, FakeIndex
from proxy.testing.listener import Connection, Listener
from proxy.testing.overload import POISONED_TOKEN, Load, Misbehaviour, Overload
from proxy.testing.pattern import Pattern, digests
from proxy.testing.quota import PullCounter, PullQuota
from proxy.testing.signed import SignedUrls
from proxy.testing.tokens import Accounts, Guard, Policy, Service, TokenService
from proxy.testing.transmit import Transmitter
from proxy.testing.wire import (
    TOKEN_PATH,
    Asked,
    Kind,
    Reply,
    error_reply,
    read_request,
)

_NOBODY: Mapping[str, str] = {}
_NOTHING_PRIVATE: Mapping[str, Collection[str]] = {}


class FakeRegistry:
    """`async with FakeRegistry(...) as registry:` serves on `registry.url` until the block ends.

    - `host`, `port`: where to listen (a free port for 0). `name`: the host that `url` shows, for
      tests that need two names of one machine ("localhost").
    - `limit`: sockets ESTABLISHED at accept; requests on a socket beyond it get `over_limit_status`
      (401: with Harbor's database text and an empty challenge), then FIN.
    - `overload`: what happens beyond how many requests in progress.
    - `auth`: `basic` (everybody needs a login) or `bearer`. `users`: passwords. `identities`: users
      by identity token; without any the token service knows no POST. `private`: the
      users of a repository; other repositories are public. `token_service`: the registry that
      serves the token URL, by default this one; may be set until this one listens, and another
      one has to know its port by then.
      `token_ttl`: seconds. `opaque_tokens`: no JWT. `harbor`: refuse in Harbor's way (see
      `proxy.testing.tokens`).
    - `redirect_blobs_to`: a registry that serves this one's blobs by signed URLs, each valid for
      `signed_url_ttl` seconds; it refuses requests that carry an Authorization header.
    - `pulls`: a quota of manifest GETs, as Docker Hub has one.
    - `rate`: body bytes per second and connection. `latency`: seconds before each answer.
    - `ranges`: whether Range is served. `page_size`: most entries of a list. `greeting`: bytes that
      each connection begins with, before anything was asked.
    - `clock`: seconds since the epoch, for tokens and signed URLs.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        name: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        limit: int | None = None,
        over_limit_status: int = 401,
        overload: Overload | None = None,
        auth: Literal["basic", "bearer"] | None = None,
        users: Mapping[str, str] = _NOBODY,
        identities: Mapping[str, str] = _NOBODY,
        private: Mapping[str, Collection[str]] = _NOTHING_PRIVATE,
        token_service: FakeRegistry | None = None,
        token_ttl: float = 300.0,
        opaque_tokens: bool = False,
        harbor: bool = False,
        redirect_blobs_to: FakeRegistry | None = None,
        signed_url_ttl: float = 300.0,
        pulls: PullQuota | None = None,
        rate: int | None = None,
        latency: float = 0.0,
        ranges: bool = True,
        page_size: int | None = None,
        greeting: bytes = b"",
        keep_seen: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.host, self.port = name or host, port
        self._bind_to = host
        self._scheme = "http" if ssl_context is None else "https"
        self.latency = latency
        self.over_limit_status = over_limit_status
        self.content = Content()
        self.stalls = Parking()
        self.pulls = PullCounter(pulls, clock)
        self.tokens = TokenService(clock)
        self.signed_urls = SignedUrls(self.content, clock)
        self.signed_url_ttl = signed_url_ttl
        self._cdn = redirect_blobs_to
        accounts = Accounts(users, private, identities)
        self._make_door(auth, Policy(accounts, token_ttl, opaque_tokens, harbor), token_service)
        self._manners = Manners(ranges, page_size)
        self._script = Script()
        self._holds: list[Hold] = []
        self._listener = Listener(self._handle, limit, self._note_accept, ssl_context, greeting)
        self.counters = Counters(self._listener.established, keep_seen=keep_seen, clock=clock)
        self._load = Load(overload, self.counters.note_progress)
        self._transmitter = Transmitter(rate, self.stalls, self._note_body, self.counters.note_raw)

    def _make_door(
        self,
        auth: Literal["basic", "bearer"] | None,
        policy: Policy,
        token_service: FakeRegistry | None,
    ) -> None:
        """Who comes in, and who gives tokens for that; the guard begins with the listener."""
        self._auth = auth
        self._policy = policy
        self.token_service = token_service or self
        self._guard: Guard | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        self.port = await self._listener.open(self._bind_to, self.port)
        if self._auth is not None:
            self._guard = self._make_guard(self._auth)
        if self._cdn is not None:
            self._cdn.signed_urls.sources.append(self.content)

    async def close(self) -> None:
        """Close every socket and end every request; idempotent."""
        await self._listener.close()
        if self._cdn is not None and self.content in self._cdn.signed_urls.sources:
            self._cdn.signed_urls.sources.remove(self.content)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def netloc(self) -> str:
        """`host:port`, as image names and `ns` carry it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """Scheme, host and port, without a slash at the end."""
        return f"{self._scheme}://{self.netloc}"

    @property
    def limit(self) -> int | None:
        """Sockets allowed at once; may be set, and holds for those accepted afterwards."""
        return self._listener.limit

    @limit.setter
    def limit(self, sockets: int | None) -> None:
        self._listener.limit = sockets

    @property
    def overload(self) -> Overload | None:
        """When it breaks and how; may be set, and holds for requests that arrive afterwards."""
        return self._load.overload

    @overload.setter
    def overload(self, overload: Overload | None) -> None:
        self._load.overload = overload

    def push(self, image: FakeImage | FakeIndex) -> None:
        """Store an image (or an index with its images) under its own name and tag."""
        self.content.push(image, image.name, image.tag)

    def retag(self, name: str, tag: str, image: FakeImage | FakeIndex) -> None:
        """Point `name:tag` at an image, storing it there as well."""
        self.content.push(image, name, tag)

    def put_patterns(self, name: str, size: int, count: int) -> list[Digest]:
        """Have blobs of any size in a repository, without keeping them in memory."""
        found = digests(size, count) if count else []
        for number, digest in enumerate(found):
            self.content.put_blob(name, Pattern(size, number), digest)
        return found

    def put_blob(self, name: str, data: bytes, algorithm: str = "sha256") -> Digest:
        """Store one blob in a repository."""
        digest = Digest.of(data, algorithm)
        self.content.put_blob(name, data, digest)
        return digest

    def put_manifest(
        self, name: str, data: bytes, media_type: str, *, tag: str | None = None
    ) -> Digest:
        """Store manifest bytes as they are, be they valid or not."""
        digest = Digest.of(data)
        self.content.put_manifest(name, data, media_type, digest, tag)
        return digest

    def remove(self, name: str, reference: str | Digest | None = None) -> None:
        """Forget a tag, manifest or blob of a repository, or all of it. Raises KeyError."""
        self.content.remove(name, None if reference is None else str(reference))

    def script(self, *faults: Fault) -> None:
        """Queue faults; the earliest queued one that matches a request strikes it."""
        self._script.add(faults)

    def clear_script(self) -> None:
        """Drop all faults that are left."""
        self._script.clear()

    def hold(
        self,
        *,
        kind: str | None = None,
        reference: str | Digest | None = None,
        repository: str | None = None,
        method: str | None = None,
    ) -> Hold:
        """Stop matching requests before they are answered (see `Hold`). None matches all."""
        check_kind(kind)

        def stops(asked: Asked) -> bool:
            meant = meant_digest(asked, self.content)
            return matches(asked, meant, kind, reference, repository, method)

        hold = Hold(stops)
        self._holds.append(hold)
        return hold

    def release(self) -> None:
        """Let every stalled or hanging request go on; `stalls.arrived(n)` awaits them."""
        self.stalls.release()

    async def drop_connections(self, *, idle_only: bool = False) -> None:
        """Close the connections that are open, as a server does that restarts."""
        await self._listener.drop_connections(idle_only=idle_only)

    def _make_guard(self, auth: str) -> Guard:
        service = Service(self.netloc, self._policy, self.content.has_project)
        if auth == "basic":
            return Guard(service, None, None)
        issuer = self.token_service
        issuer.tokens.adopt(service)
        return Guard(service, issuer.tokens, issuer.url + TOKEN_PATH)

    async def _handle(self, request: web.BaseRequest, connection: Connection) -> web.StreamResponse:
        asked = read_request(request)
        if asked.kind is Kind.TOKEN and asked.method == "POST":
            asked = replace(asked, form=dict(parse_qsl((await request.read()).decode())))
        seen = self.counters.note_request(asked)
        if connection.is_over_limit:
            self.counters.refused += 1
            seen.status = self.over_limit_status
            refusal = _over_limit(self.over_limit_status)
            return await self._transmitter.send(request, connection, refusal, close=True)
        if asked.signed:  # the storage behind the registry, which does not ask its database
            return await self._serve(request, connection, asked, seen)
        struck = self._load.strike(asked)
        if struck is not None:
            self.counters.note_overload(seen, struck)
            return await self._break(request, connection, asked, seen, struck)
        with self._load.carrying():
            return await self._serve(request, connection, asked, seen)

    async def _break(
        self,
        request: web.BaseRequest,
        connection: Connection,
        asked: Asked,
        seen: Seen,
        struck: Misbehaviour,
    ) -> web.StreamResponse:
        assert self.overload is not None
        await asyncio.sleep(self.overload.refusal_time)
        if struck is Misbehaviour.RESET:
            action = Disconnect(reset=True)
            return await self._transmitter.send(request, connection, Reply(500), action)
        honest = {} if self._guard is None else self._guard.challenge(asked)
        reply = self._load.broken_reply(struck, asked, honest) or self._issue(asked, empty=True)
        seen.status = reply.status
        return await self._transmitter.send(request, connection, reply)

    async def _serve(
        self, request: web.BaseRequest, connection: Connection, asked: Asked, seen: Seen
    ) -> web.StreamResponse:
        if self.latency:
            await asyncio.sleep(self.latency)
        reply = self._refusal(asked)
        if reply is not None and self.tokens.is_poisoned(asked):
            self.counters.note_overload(seen, POISONED_TOKEN)
        action: Action | None = None
        if reply is None:
            self._note_get(asked)
            for hold in [hold for hold in self._holds if hold.stops(asked)]:
                await hold.enter()
            self._holds = [hold for hold in self._holds if not hold.is_lifted]
            action = self._script.take(asked, meant_digest(asked, self.content))
            if isinstance(action, Hang):
                await self.stalls.enter()
            spent = self.pulls.count(asked)
            reply = spent or self.pulls.told(asked, distort(action, self._answer(asked, action)))
        seen.status = reply.status
        return await self._transmitter.send(request, connection, reply, action)

    def _refusal(self, asked: Asked) -> Reply | None:
        if asked.signed:
            self.counters.authorization_leaks += "Authorization" in asked.headers
            return self.signed_urls.refusal(asked)
        if self._guard is None or asked.kind is Kind.TOKEN:
            return None
        return self._guard.refusal(asked)

    def _answer(self, asked: Asked, action: Action | None) -> Reply:
        if asked.kind is Kind.TOKEN:
            return self._issue(asked, empty=isinstance(action, EmptyAccess))
        manners = self._manners
        if isinstance(action, IgnoreRange):
            manners = Manners(ranges=False, page_size=manners.page_size)
        if asked.signed:
            return self.signed_urls.answer(asked, manners)
        reply = answer(asked, self.content, manners)
        if self._cdn is not None and asked.kind is Kind.BLOB and reply.content is not None:
            target = self._cdn.signed_urls.path_for(reply.content, self.signed_url_ttl)
            reply = Reply(307, b"", {"Location": self._cdn.url + target})
        return reply.with_headers(Docker_Distribution_Api_Version="registry/2.0")

    def _issue(self, asked: Asked, *, empty: bool) -> Reply:
        reply = self.tokens.issue(asked, empty=empty)
        self.counters.tokens_issued += reply.status == 200
        return reply

    def _note_accept(self, established: int) -> None:
        self.counters.note_accept(established)

    def _note_body(self, reply: Reply, count: int) -> None:
        self.counters.note_body(reply.content, count)

    def _note_get(self, asked: Asked) -> None:
        meant = meant_digest(asked, self.content)
        if meant is not None and asked.method == "GET":
            self.counters.gets[meant] += 1

    def __repr__(self) -> str:
        return f"<FakeRegistry {self.url} limit {self.limit}, {self.counters!r}>"


def _over_limit(status: int) -> Reply:
    """Harbor with its database at max_connections, or an honest refusal for other statuses."""
    if status == 401:
        text = "pq: sorry, too many clients already"
        return error_reply(401, "UNAUTHORIZED", text, {"WWW-Authenticate": ""})
    return error_reply(status, "TOOMANYREQUESTS", "too many connections")
