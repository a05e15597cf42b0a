"""The listener for other nodes: stripes of blobs by digest, and nothing else (fleet/protocol.py).

Never on the registry's address, and closed unless it is configured. A request has to prove that it
is a node's before anything else is looked at: by its seal (fleet/seal.py) where nodes share a
secret, by the certificate of its connection where they have an authority of their own, by both
where there are both. With neither the listener is for this machine alone.

What is sent goes out as from the registry's listener: by sendfile from the store's files, as it
comes from a flight under way; through the byte rate of the uplink; in one of few places
(transfers.py). A taker that takes nothing for ``STUCK`` seconds loses its place. A body that cannot
be finished ends early: what its taker has of it was verified piece by piece.

A refusal says as much as a node may know, and nothing to who is none: what was wrong with a seal is
in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from typing import Any

from aiohttp import web

from proxy.fleet.pieces import PIECE
from proxy.fleet.protocol import PIECES, RANK, SEAL, STRIPE, StripeAsk, written
from proxy.fleet.seal import Seal, Sealer, Unsealed, answer_said, request_said
from proxy.observe.logs import Logger
from proxy.observe.peers import PeerMetrics
from proxy.oci.errors import (
    ClientError,
    ErrorCode,
    InternalError,
    PeerFailed,
    PullError,
    RequestInvalid,
    ShuttingDown,
)
from proxy.oci.ranges import Span
from proxy.pull.giving import OpenStripe, Shelf
from proxy.pull.reader import FileSpan, Piece
from proxy.throttle import Stream, Throttle
from proxy.web.access import CLIENT_LEFT, MAX_TEXT
from proxy.web.descriptors import Descriptors
from proxy.web.listener import Listener, listening
from proxy.web.reload import Reloader, Unusable
from proxy.web.sending import BodyResponse, Sender, break_off, parts
from proxy.web.server import RegistryRunner, RegistryServer
from proxy.web.tls import TlsFiles, certificate_name, peer_context, server_context
from proxy.web.transfers import Transfers

#: Seconds that a taker may take none of a piece.
STUCK = 15.0
#: Seconds that a connection is kept for the next request: longer than a taker keeps it.
KEEPALIVE = 75.0
#: Bytes of a request's lines, each.
MAX_HEAD = 4 << 10
#: Seconds that handlers get to end once they are cancelled.
CANCEL_PATIENCE = 0.2


class Unproven(ClientError):
    """Who asks has not shown to be a node of this fleet."""

    reason = "unproven"
    default_message = "this is for nodes of the fleet"
    status = 401
    code = ErrorCode.UNAUTHORIZED


class OtherStripe(ClientError):
    """The taker was told another hash of the stripe than that of what is held here."""

    reason = "other_stripe"
    default_message = "what is held here has another hash"
    status = 409


class Call:
    """What is known of one request so far; written once when it ends."""

    def __init__(self, request: web.BaseRequest, began: float) -> None:
        self.request = request
        self.request_id = secrets.token_hex(8)
        self.began = began
        self.seal: Seal | None = None
        self.name: str | None = None  # in the certificate
        self.ask: StripeAsk | None = None
        self.status = 0
        self.sent = 0
        self.error: PullError | None = None
        self.defect: Exception | None = None
        self.left = False

    @property
    def code(self) -> int:
        """The status for logs and metrics."""
        return CLIENT_LEFT if self.left else self.status

    def fields(self, seconds: float) -> dict[str, object]:
        """What the log says of it."""
        fields: dict[str, object] = {
            "request_id": self.request_id,
            "peer": self.request.remote,
            "path": self.request.raw_path[:MAX_TEXT],
            "status": self.code,
            "bytes": self.sent,
            "ms": round(seconds * 1000, 1),
        }
        if self.seal is not None:
            fields["node"] = self.seal.taker
        if self.name is not None:
            fields["name"] = self.name
        if self.ask is not None:
            fields["from"] = self.ask.start
        if self.error is not None:
            fields["reason"] = self.error.reason
            fields["error"] = str(self.error.__cause__ or self.error)
        return fields


class PeerDoor:
    """Handles every request of the peer listener."""

    def __init__(
        self,
        shelf: Shelf,
        *,
        transfers: Transfers,
        metrics: PeerMetrics,
        log: Logger,
        clock: Callable[[], float],
        sealer: Sealer | None = None,
        needs_certificate: bool = False,
        uplink: Throttle | None = None,
        is_draining: Callable[[], bool] = lambda: False,
        stuck: float = STUCK,
    ) -> None:
        """``clock`` is monotonic. With neither ``sealer`` nor ``needs_certificate`` only this
        machine is answered."""
        self.is_proved = sealer is not None or needs_certificate
        self._shelf = shelf
        self._transfers = transfers
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._sealer = sealer
        self._needs_certificate = needs_certificate
        self._uplink = uplink
        self._is_draining = is_draining
        self._stuck = stuck

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request; the handler of aiohttp's low-level server."""
        call = Call(request, self._clock())
        try:
            return await self._answer_or_refuse(call)
        except (asyncio.CancelledError, ConnectionError):
            call.left = True
            raise
        finally:
            self._end(call)

    def malformed(self, request: web.BaseRequest, _words: str) -> web.StreamResponse:
        """Answer what could not be parsed as HTTP."""
        call = Call(request, self._clock())
        error = call.error = RequestInvalid("the request is not valid HTTP")
        call.status = error.status
        headers = {"Content-Type": "application/json"}
        body = error.body(call.request_id)
        response = web.Response(status=error.status, headers=headers, body=body)
        response.force_close()
        self._end(call)
        return response

    def _end(self, call: Call) -> None:
        self._metrics.requests.labels(str(call.code)).inc()
        self._metrics.bytes.labels("sent").inc(call.sent)
        fields = call.fields(self._clock() - call.began)
        if call.defect is not None:
            self._log.error("peer_request", **fields, exc_info=call.defect)
        elif call.error is not None:
            self._log.warning("peer_request", **fields)
        else:
            self._log.info("peer_request", **fields)

    async def _answer_or_refuse(self, call: Call) -> web.StreamResponse:
        failure: PullError
        try:
            return await self._answer(call)
        except PullError as error:
            failure = error
        except ConnectionError:
            raise
        except Exception as error:  # a defect of ours: the taker gets JSON, the log the trace
            call.defect = error
            if call.status:
                raise ConnectionResetError("the answer had begun when it failed") from error
            failure = InternalError()
        return await self._refuse(call, failure)

    async def _answer(self, call: Call) -> web.StreamResponse:
        request = call.request
        self._prove(call)
        if request.method != "GET":
            raise ClientError("stripes are only given", status=405, headers={"Allow": "GET"})
        if request.body_exists:
            raise RequestInvalid("a request for a stripe has no body")
        rank, asked_range = _only(request, RANK), _only(request, "Range")
        told = _only(request, STRIPE)
        call.ask = ask = StripeAsk.parse(request.raw_path, rank, asked_range, told)
        if self._is_draining():
            raise ShuttingDown
        stripe = await self._shelf.open(ask)
        try:
            if ask.stripe_hash not in (None, stripe.pieces.stripe_hash):
                raise OtherStripe
            # A place only now: who waits for a stripe that has not come would keep the uplink idle.
            async with self._transfers.place():
                with self._metrics.transfers.track_inprogress():
                    return await self._send(call, stripe, ask.start)
        finally:
            # After the body, or after its transport was aborted: never under a sendfile.
            stripe.close()

    # -- who asks -------------------------------------------------------------------------

    def _prove(self, call: Call) -> None:
        """Raises ``Unproven`` unless a node asks."""
        request = call.request
        try:
            self._check_connection(call)
            if self._sealer is not None:
                rank, asked_range = _only(request, RANK), _only(request, "Range")
                told = _only(request, STRIPE)
                said = request_said(request.method, request.raw_path, rank, asked_range, told)
                call.seal = self._sealer.accept(_only(request, SEAL), said)
        except (Unsealed, RequestInvalid, ValueError) as error:
            self._metrics.unsealed.inc()
            raise Unproven from error

    def _check_connection(self, call: Call) -> None:
        transport = call.request.transport
        if self._needs_certificate:
            certificate = None if transport is None else transport.get_extra_info("peercert")
            call.name = certificate_name(certificate)
            if not certificate:
                raise Unsealed("the connection has no certificate")
        if not self.is_proved and not is_loopback(call.request.remote or ""):
            raise Unsealed("without a secret or certificates only this machine is answered")

    # -- the answer -----------------------------------------------------------------------

    async def _send(self, call: Call, stripe: OpenStripe, start: int) -> web.StreamResponse:
        pieces = stripe.pieces
        if start >= pieces.length:
            raise RequestInvalid(f"the stripe has {pieces.length} bytes, none from {start} on")
        headers = {"Content-Type": "application/octet-stream", PIECES: written(pieces)}
        if start:
            headers["Content-Range"] = Span(start, pieces.length, pieces.length).content_range
        response = self._head(call, 206 if start else 200, headers, pieces.length - start)
        await response.prepare(call.request)
        sender = Sender(call.request, response)
        try:
            async with asyncio.timeout(None) as limit:
                await sender.send_all(self._paced(stripe.read(start), limit))
            await response.write_eof()
        except PullError as error:
            # The status is gone: only the connection can say that this did not work. By FIN, which
            # is heard behind all pieces that came before it; they prove themselves.
            call.error = error
            break_off(call.request, response, reset=False)
        except TimeoutError:
            call.error = PeerFailed(f"the taker took nothing for {self._stuck:g} s")
            break_off(call.request, response, reset=True)
        except BaseException:
            break_off(call.request, response, reset=True)
            raise
        finally:
            call.sent = sender.sent
        return response

    async def _paced(
        self, source: AsyncGenerator[Piece, None], limit: asyncio.Timeout
    ) -> AsyncGenerator[Piece, None]:
        """The same bytes, each part when the uplink lets it, and with a time to be taken in."""
        loop = asyncio.get_running_loop()
        stream = None if self._uplink is None else self._uplink.stream(prompt=False)
        most = PIECE if stream is None else even(PIECE, stream.piece)
        try:
            async for piece in source:
                for part, goes_on in whole_pieces(piece, most):
                    await _take(stream, part, goes_on=goes_on)
                    limit.reschedule(loop.time() + self._stuck)
                    yield part
                    limit.reschedule(None)
        finally:
            await source.aclose()

    async def _refuse(self, call: Call, error: PullError) -> web.StreamResponse:
        call.error = error
        body = error.body(call.request_id)
        headers = {**error.headers, "Content-Type": "application/json"}
        response = self._head(call, error.status, headers, len(body))
        if isinstance(error, ClientError | ShuttingDown):
            # Whoever asks like this is not one to wait for; and an unread body is no next request.
            response.force_close()
        await response.prepare(call.request)
        if call.request.method != "HEAD":
            await response.write_eof(body)
            call.sent = len(body)
        else:
            await response.write_eof()
        return response

    def _head(
        self, call: Call, status: int, headers: Mapping[str, str], length: int
    ) -> BodyResponse:
        """The head of an answer, sealed if the request was."""
        call.status = status
        sealed = dict(headers)
        if self._sealer is not None and call.seal is not None:
            said = answer_said(
                status,
                length=str(length),
                content_range=headers.get("Content-Range"),
                pieces=headers.get(PIECES),
                retry_after=headers.get("Retry-After"),
            )
            sealed[SEAL] = self._sealer.seal_answer(call.seal, said)
        response = BodyResponse(status=status, headers={"Server": "pullpool", **sealed})
        response.content_length = length
        return response

    def __repr__(self) -> str:
        return f"<PeerDoor {self._transfers!r}>"


class PeerContexts:
    """What nodes that have an authority of their own speak TLS with, read again when it changes."""

    def __init__(self, files: TlsFiles, server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        """For ``read``, which is the way to get one."""
        self.files = files
        self.server = server
        self._client = client

    @classmethod
    async def read(cls, files: TlsFiles) -> PeerContexts:
        """Raises ``Unusable``."""
        return cls(files, *await asyncio.to_thread(_contexts, files))

    def client(self) -> ssl.SSLContext:
        """What to dial other nodes with, now."""
        return self._client

    async def reload(self) -> None:
        """Read the files again. Raises ``Unusable``; then all stays as it was."""
        self.server, self._client = await asyncio.to_thread(_contexts, self.files)


def _contexts(files: TlsFiles) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return server_context(files), peer_context(files)


@contextlib.asynccontextmanager
async def giving(
    door: PeerDoor,
    host: str,
    port: int,
    *,
    descriptors: Descriptors,
    log: Logger,
    contexts: PeerContexts | None = None,
    interval: float | None = None,
) -> AsyncIterator[Listener]:
    """Answer other nodes on an address until the block ends.

    Raises ``OSError``, and ``Unusable`` for an address that others than this machine can reach
    while nothing tells nodes from strangers. ``interval``: seconds between two looks at the files.
    """
    if not door.is_proved and not is_loopback(host):
        raise Unusable(f"{host} is not this machine: set a secret or certificates for the fleet")
    server = RegistryServer(
        door,
        door.malformed,
        access_log=None,
        keepalive_timeout=KEEPALIVE,
        handler_cancellation=True,
        lingering_time=0.0,  # a body that nobody asked for is not waited for
        max_line_size=MAX_HEAD,
        max_field_size=MAX_HEAD,
        auto_decompress=False,
    )
    runner = RegistryRunner(server, shutdown_timeout=CANCEL_PATIENCE)
    tls = None if contexts is None else contexts.server
    async with listening(runner, host, port, tls=tls, descriptors=descriptors) as listener:
        if contexts is None:
            yield listener
            return
        async with _renewed(contexts, listener, log, interval):
            yield listener


def _renewed(
    contexts: PeerContexts, listener: Listener, log: Logger, interval: float | None
) -> Reloader:
    async def reload() -> None:
        await contexts.reload()
        listener.replace_tls(contexts.server)

    options: dict[str, Any] = {} if interval is None else {"interval": interval}
    return Reloader(contexts.files.all, reload, log=log, **options)


def is_loopback(host: str) -> bool:
    """Is it an address that only this machine reaches?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _only(request: web.BaseRequest, name: str) -> str | None:
    """A header that may come once. Raises ``RequestInvalid``."""
    values = request.headers.getall(name, [])
    if len(values) > 1:
        raise RequestInvalid(f"{name} came more than once")
    return values[0] if values else None


def even(whole: int, most: int) -> int:
    """The length of equal parts of at most so many bytes; the last may be shorter."""
    return -(-whole // -(-whole // most))


def whole_pieces(piece: Piece, most: int) -> Iterator[tuple[Piece, bool]]:
    """Parts of at most ``most`` bytes, and whether each goes on with one of the pieces in which
    stripes are verified. What is read begins with such a piece."""
    for whole in parts(piece, PIECE):
        goes_on = False
        for part in parts(whole, most):
            yield part, goes_on
            goes_on = True


async def _take(stream: Stream | None, part: Piece, *, goes_on: bool) -> None:
    if stream is not None:
        count = part.length if isinstance(part, FileSpan) else len(part)
        await stream.take(count, goes_on=goes_on)
