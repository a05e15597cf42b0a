"""The registry listener: ``/v2/`` and nothing else (DESIGN §6).

Parses a request into value types, asks the pull layer, and writes the answer with the headers of
the contract. No policy lives here. Every request ends in exactly one access-log line, whichever way
it ends; every error is OCI JSON.

Draining: requests under way go on, new ones are sent away with 503 and their connections closed;
``idle`` tells when the last one has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import parse_qsl

from aiohttp import web

from proxy.observe.metrics import Metrics
from proxy.oci.answers import (
    etag,
    etag_matches,
    overload_status,
    waits_for_a_body,
    warning,
)
from proxy.oci.digest import Digest
from proxy.oci.errors import (
    DigestMismatch,
    InternalError,
    MethodNotAllowed,
    NotAcceptable,
    Overloaded,
    PullError,
    RequestInvalid,
    ShuttingDown,
    SizeMismatch,
)
from proxy.oci.links import rewrite_next
from proxy.oci.manifest import acceptable
from proxy.oci.paths import Kind, Target, parse_path
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference
from proxy.pull.asks import Ask, BlobAnswer, CacheWord
from proxy.pull.deadlines import COME_AGAIN
from proxy.pull.serve import Answerer
from proxy.throttle import Stream, Throttles
from proxy.upstream.routing import Route, Routes
from proxy.web.access import AccessLog, Visit
from proxy.web.auth import Authentication
from proxy.web.clients import Clients, certified
from proxy.web.sending import BodyResponse, Sender, break_off, send_head

COMMON = {"Docker-Distribution-Api-Version": "registry/2.0", "Server": "pullpool"}
#: Is told a request that was answered, and what it was for.
Offer = Callable[[web.BaseRequest, Route, Target], None]
#: Query parameters of a request, at most.
MAX_PARAMETERS = 32
#: Targets of requests that are kept as they were parsed, and characters of one of them, at most.
KEPT, MAX_KEPT = 256, 512
#: Characters of the parser's words about a malformed request that are said back.
MAX_WORDS = 200


@dataclass(frozen=True, slots=True)
class Parsed:
    """A request, validated."""

    target: Target
    ns: str | None
    query: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class ClientThrottles:
    """The byte rate of each client: for blobs, and for the short answers that do not wait behind
    them. They are the same, unless the rate is too low to have manifests by."""

    bulk: Throttles
    prompt: Throttles


class Registry:
    """Handles every request of the registry listener."""

    def __init__(
        self,
        *,
        puller: Answerer,
        routes: Routes,
        metrics: Metrics,
        access_log: AccessLog,
        clock: Callable[[], float],
        clients: Clients | None = None,
        authentication: Authentication | None = None,
        header_deadline: float = 20.0,
        throttles: ClientThrottles | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        offer: Offer | None = None,
    ) -> None:
        """``header_deadline`` in seconds: what a client's password may take of it, at most.
        ``offer`` is told each request that content was sent for."""
        self._puller = puller
        self._routes = routes
        self._metrics = metrics
        self._access_log = access_log
        self._clock = clock
        self._clients = clients or Clients()
        self._authentication = authentication
        self._header_deadline = header_deadline
        self._throttles = throttles
        self._is_draining = is_draining
        self._offer = offer
        self._parsed: dict[str, Parsed] = {}  # by the request's target
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        await self._idle.wait()

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; the handler of aiohttp's low-level server."""
        visit = self._begin(request)
        try:
            return await self._answer_or_refuse(request, visit)
        except (asyncio.CancelledError, ConnectionError):
            visit.client_left()
            raise
        finally:
            self._end(visit)

    def malformed(self, request: web.BaseRequest, words: str) -> web.StreamResponse:
        """Answer what could not be parsed as HTTP."""
        visit = self._begin(request)
        said = " ".join(words.split())[:MAX_WORDS]
        error = RequestInvalid(f"the request is not valid HTTP: {said}")
        visit.failed(error)
        visit.answered(error.status)
        headers = self._headers(visit, {"Content-Type": "application/json"})
        body = error.body(visit.request_id)
        response = web.Response(status=error.status, headers=headers, body=body)
        response.force_close()
        visit.sent = len(body)
        self._end(visit)
        return response

    def _begin(self, request: web.BaseRequest) -> Visit:
        client = self._clients.address(request)
        self._metrics.http_inflight.inc()
        self._under_way += 1
        self._idle.clear()
        arrived = asyncio.get_running_loop().time()
        return Visit(request, secrets.token_hex(8), self._clock, client, since=arrived)

    def _end(self, visit: Visit) -> None:
        self._metrics.http_inflight.dec()
        self._under_way -= 1
        if not self._under_way:
            self._idle.set()
        self._access_log.write(visit)

    async def _answer_or_refuse(self, request: web.BaseRequest, visit: Visit) -> web.StreamResponse:
        failure: PullError
        try:
            return await self._answer(request, visit)
        except PullError as error:
            failure = error
        except ConnectionError:
            raise
        except Exception as error:  # a defect of ours: the client gets OCI JSON, the log the trace
            visit.defect = error
            if visit.has_answered:
                raise ConnectionResetError("the answer had begun when it failed") from error
            failure = InternalError()
        return await self._refuse(request, visit, failure)

    async def _answer(self, request: web.BaseRequest, visit: Visit) -> web.StreamResponse:
        visit.user = certified(request)
        if self._authentication is not None:
            visit.user = await self._name(self._authentication, request, visit)
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed
        parsed = self._parse(request)
        visit.kind = parsed.target.kind
        if self._is_draining():
            raise ShuttingDown
        if parsed.target.repository is None:
            return await self._ping(request, visit)
        route = self._routes.route(parsed.target.repository, parsed.ns)
        is_patient = waits_for_a_body(request.headers.get("User-Agent"))
        visit.ask = Ask(route, visit.key, visit.since, is_patient)
        handlers = {
            Kind.MANIFEST: self._manifest,
            Kind.BLOB: self._blob,
            Kind.TAGS: self._listing,
            Kind.REFERRERS: self._listing,
        }
        response = await handlers[parsed.target.kind](request, visit, visit.ask, parsed)
        if self._offer is not None and visit.status in (200, 304) and visit.error is None:
            self._offer(request, route, parsed.target)
        return response

    def _parse(self, request: web.BaseRequest) -> Parsed:
        """As ``parse_request``: a crowd asks for the same, in the same words."""
        target = request.raw_path
        parsed = self._parsed.get(target)
        if parsed is None:
            parsed = parse_request(request)
            if len(target) <= MAX_KEPT:
                if len(self._parsed) >= KEPT:
                    self._parsed.clear()
                self._parsed[target] = parsed
        return parsed

    async def _name(
        self, authentication: Authentication, request: web.BaseRequest, visit: Visit
    ) -> str:
        """The name that the client has shown. Raises ``Unauthenticated``; ``Overloaded`` when so
        many passwords are being checked that this one's turn does not come."""
        try:
            async with asyncio.timeout_at(visit.since + self._header_deadline):
                return await authentication.name(request)
        except TimeoutError:
            raise Overloaded(COME_AGAIN, message="too many passwords are being checked") from None

    # -- the kinds -------------------------------------------------------------------------

    async def _ping(self, request: web.BaseRequest, visit: Visit) -> web.StreamResponse:
        headers = {"Content-Type": "application/json"}
        return await self._send_bytes(request, visit, 200, headers, b"{}")

    async def _manifest(
        self, request: web.BaseRequest, visit: Visit, ask: Ask, parsed: Parsed
    ) -> web.StreamResponse:
        reference = _reference(parsed.target)
        head = request.method == "HEAD"
        answer = await self._puller.manifest(ask, reference, head=head)
        visit.cache = answer.cache
        if not acceptable(answer.media_type, request.headers.getall("Accept", [])):
            raise NotAcceptable(detail={"media_type": answer.media_type})
        headers = content_headers(answer.digest, answer.media_type, answer.warning)
        if etag_matches(request.headers.get("If-None-Match"), answer.digest):
            return await self._send_bytes(request, visit, 304, headers, b"")
        body = answer.manifest.raw if answer.manifest is not None and not head else b""
        return await self._send_bytes(request, visit, 200, headers, body, size=answer.size)

    async def _blob(
        self, request: web.BaseRequest, visit: Visit, ask: Ask, parsed: Parsed
    ) -> web.StreamResponse:
        digest = _reference(parsed.target)
        if not isinstance(digest, Digest):
            raise RequestInvalid("a blob is named by its digest")
        unchanged = etag_matches(request.headers.get("If-None-Match"), digest)
        head = request.method == "HEAD" or unchanged
        answer = await self._puller.blob(ask, digest, _range(request, digest), head=head)
        try:
            visit.cache = answer.cache
            return await self._send_blob(request, visit, answer, unchanged=unchanged)
        finally:
            # After the body, or after its transport was aborted: never under a sendfile.
            if answer.pieces is not None:
                await answer.pieces.aclose()
            answer.close()

    async def _send_blob(
        self, request: web.BaseRequest, visit: Visit, answer: BlobAnswer, *, unchanged: bool
    ) -> web.StreamResponse:
        headers = content_headers(answer.digest, None, answer.warning)
        if unchanged:
            return await self._send_bytes(request, visit, 304, headers, b"")
        if answer.pieces is None:
            size = answer.size
            return await self._send_bytes(request, visit, 200, headers, b"", size=size)
        if answer.span is not None:
            headers["Content-Range"] = answer.span.content_range
        status = 200 if answer.span is None else 206
        response = BodyResponse(status=status, headers=self._headers(visit, headers))
        response.content_length = answer.span.length if answer.span else answer.size
        response.hold_head()
        visit.answered(status)
        await response.prepare(request)
        sender = Sender(request, response)
        try:
            with self._stream(visit, prompt=False) as stream:
                if stream is not None or not answer.is_at_hand:
                    send_head(request)
                await sender.send_all(answer.pieces, stream)
            await response.write_eof()
        except PullError as error:
            # The status is gone: only the connection can say that this did not work.
            visit.failed(error)
            break_off(request, response, reset=isinstance(error, DigestMismatch | SizeMismatch))
        except BaseException:
            break_off(request, response, reset=True)
            raise
        finally:
            visit.sent = sender.sent
        return response

    async def _listing(
        self, request: web.BaseRequest, visit: Visit, ask: Ask, parsed: Parsed
    ) -> web.StreamResponse:
        target = parsed.target
        tail = "tags/list" if target.kind is Kind.TAGS else f"referrers/{target.reference}"
        page = await self._puller.listing(ask, target.kind, tail, parsed.query)
        visit.cache = CacheWord.MISS
        headers = {"Content-Type": page.media_type}
        link = rewrite_next(page.link, f"/v2/{target.repository}/{tail}", parsed.ns)
        if link is not None:
            headers["Link"] = link
        if page.filters is not None:
            headers["OCI-Filters-Applied"] = page.filters
        return await self._send_bytes(request, visit, 200, headers, page.body)

    # -- answers ---------------------------------------------------------------------------

    def _headers(self, visit: Visit, headers: Mapping[str, str]) -> dict[str, str]:
        return contract_headers(visit, headers)

    async def _send_bytes(
        self,
        request: web.BaseRequest,
        visit: Visit,
        status: int,
        headers: Mapping[str, str],
        body: bytes,
        *,
        size: int | None = None,
        close: bool = False,
    ) -> web.StreamResponse:
        """A whole answer. A HEAD gets ``size`` (default: the body's) as its Content-Length."""
        response = BodyResponse(status=status, headers=self._headers(visit, headers))
        if close:
            response.force_close()
        head = request.method == "HEAD"
        if status != 304 and not (head and size is None and not body):
            response.content_length = len(body) if size is None else size
        visit.answered(status)
        await response.prepare(request)
        if not head and status != 304:
            await self._throttled(visit, len(body))
            await response.write_eof(body)
            visit.sent = len(body)
        else:
            await response.write_eof()
        return response

    def _stream(
        self, visit: Visit, *, prompt: bool
    ) -> contextlib.AbstractContextManager[Stream | None]:
        """The way through the client's byte rate, if there is one."""
        if self._throttles is None:
            return contextlib.nullcontext()
        throttles = self._throttles.prompt if prompt else self._throttles.bulk
        return throttles.stream(visit.key, prompt=prompt)

    async def _throttled(self, visit: Visit, length: int) -> None:
        """Wait until the client may have ``length`` bytes that are no bulk."""
        with self._stream(visit, prompt=True) as stream:
            while stream is not None and length > 0:
                await stream.take(min(length, stream.piece))
                length -= stream.piece

    async def _refuse(
        self, request: web.BaseRequest, visit: Visit, error: PullError
    ) -> web.StreamResponse:
        """The error as OCI JSON; "later" in the words this client understands (D7)."""
        visit.failed(error)
        status = error.status
        if isinstance(error, Overloaded):
            status = overload_status(request.headers.get("User-Agent"))
        headers = {**error.headers, "Content-Type": "application/json"}
        # The unread body of a write must not become the next request.
        close = request.method not in ("GET", "HEAD") or isinstance(error, ShuttingDown)
        body = error.body(visit.request_id)
        return await self._send_bytes(request, visit, status, headers, body, close=close)


def contract_headers(visit: Visit, headers: Mapping[str, str]) -> dict[str, str]:
    """``headers`` behind those that every answer has."""
    return {
        **COMMON,
        "X-Request-Id": visit.request_id,
        **visit.contract_headers(),
        **headers,
    }


def parse_request(request: web.BaseRequest) -> Parsed:
    """Validate path and query before anything else happens. Raises ``ClientError``."""
    path, _, query = origin_form(request.raw_path).partition("?")
    target = parse_path(path)
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS)
    except ValueError as error:
        raise RequestInvalid(f"the query cannot be read: {error}") from error
    named = [value for key, value in pairs if key == "ns"]
    others = tuple((key, value) for key, value in pairs if key != "ns")
    return Parsed(target, named[0] if named else None, others)


def origin_form(target: str) -> str:
    """The path and query of a request target; RFC 9112 §3.2.2 wants absolute URLs taken too."""
    scheme, separator, rest = target.partition("://")
    if separator and scheme.lower() in ("http", "https"):
        return "/" + rest.partition("/")[2]
    return target


def _reference(target: Target) -> Reference:
    if target.reference is None:
        raise RequestInvalid("the path names no reference")
    return target.reference


def _range(request: web.BaseRequest, digest: Digest) -> ByteRange | None:
    """The range to serve. If-Range with another tag means: all of it (RFC 9110 §13.1.5)."""
    condition = request.headers.get("If-Range")
    if condition is not None and condition.strip() != etag(digest):
        return None
    return ByteRange.parse(request.headers.get("Range"))


def content_headers(digest: Digest, media_type: str | None, warned: str | None) -> dict[str, str]:
    """What is said of content; ``media_type`` None: a blob's."""
    headers = {
        "Content-Type": media_type or "application/octet-stream",
        "Docker-Content-Digest": str(digest),
        "ETag": etag(digest),
    }
    if warned is not None:
        headers["Warning"] = warning(warned)
    if media_type is None:
        headers["Accept-Ranges"] = "bytes"
    return headers
