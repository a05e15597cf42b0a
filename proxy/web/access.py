"""One line per request, and the request's metrics: what happened, in the words of the contract."""

from __future__ import annotations

from collections.abc import Callable

from aiohttp import web

from proxy.observe.logs import Logger
from proxy.observe.metrics import Metrics
from proxy.oci.errors import PullError
from proxy.oci.paths import Kind
from proxy.pull.asks import Ask, CacheWord

#: The status that stands in logs and metrics for a client that left before its answer was whole.
CLIENT_LEFT = 499
#: Characters of a path or user agent in the log: a path of ours has at most 255 + 128 + 20.
MAX_TEXT = 512
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Visit:
    """What is known of one request so far; written once when it ends."""

    __slots__ = (
        "_clock",
        "arrived",
        "ask",
        "cache",
        "client",
        "defect",
        "error",
        "first_byte",
        "kind",
        "left",
        "request",
        "request_id",
        "sent",
        "since",
        "status",
        "user",
    )

    def __init__(
        self,
        request: web.BaseRequest,
        request_id: str,
        clock: Callable[[], float],
        client: str,
        *,
        since: float = 0.0,
    ) -> None:
        """``client`` is the client's address. ``clock`` is monotonic and finer than the loop's,
        which uvloop keeps in milliseconds; deadlines need the loop's, of the same moment:
        ``since``."""
        self.request = request
        self.request_id = request_id
        self._clock = clock
        self.arrived = clock()
        self.since = since
        self.client = client
        self.user: str | None = None
        self.ask: Ask | None = None
        self.kind: Kind | None = None
        self.cache = CacheWord.NONE
        self.status = 0
        self.sent = 0
        self.first_byte: float | None = None
        self.error: PullError | None = None
        self.defect: Exception | None = None
        self.left = False

    def answered(self, status: int) -> None:
        """The headers leave now."""
        self.status = status
        self.first_byte = self._clock()

    @property
    def key(self) -> str:
        """What the client is told apart by: its name, where it has shown one, or its address."""
        # No address holds a slash: nobody gets another's turns by a well-chosen name.
        return self.client if self.user is None else f"user/{self.user}"

    @property
    def has_answered(self) -> bool:
        """Have the headers left?"""
        return self.first_byte is not None

    def failed(self, error: PullError) -> None:
        self.error = error

    def client_left(self) -> None:
        self.left = True

    def contract_headers(self) -> dict[str, str]:
        """The headers that tell how a request was answered (DESIGN §6)."""
        headers = {}
        if self.cache is not CacheWord.NONE:
            headers["X-Pullpool-Cache"] = self.cache.value
        if self.ask is not None:
            timing = self.ask.timing
            headers["Server-Timing"] = (
                f"queue;dur={timing.queue * 1000:.1f}, upstream;dur={timing.upstream * 1000:.1f}"
            )
            if self.ask.route.ns is not None:
                headers["OCI-Namespace"] = self.ask.route.ns
        return headers

    @property
    def code(self) -> int:
        """The status for logs and metrics."""
        return CLIENT_LEFT if self.left else self.status


class AccessLog:
    """Writes visits to the log and to the metrics."""

    def __init__(self, log: Logger, metrics: Metrics, clock: Callable[[], float]) -> None:
        self.log = log
        self.metrics = metrics
        self.clock = clock

    def write(self, visit: Visit) -> None:
        seconds = self.clock() - visit.arrived
        self._count(visit, seconds)
        fields = self.fields(visit, seconds)
        if visit.defect is not None:
            self.log.error("request", **fields, exc_info=visit.defect)
        elif visit.error is not None and visit.error.status >= 500:
            self.log.warning("request", **fields)
        else:
            self.log.info("request", **fields)

    def _count(self, visit: Visit, seconds: float) -> None:
        kind = visit.kind.value if visit.kind is not None else "none"
        method = visit.request.method if visit.request.method in _METHODS else "other"
        self.metrics.count_request(
            kind,
            method,
            str(visit.code),
            visit.cache.value,
            seconds=seconds,
            first_byte=None if visit.first_byte is None else visit.first_byte - visit.arrived,
            sent=visit.sent,
        )

    def fields(self, visit: Visit, seconds: float) -> dict[str, object]:
        """What the line about a visit of so many seconds says."""
        request = visit.request
        fields: dict[str, object] = {
            "request_id": visit.request_id,
            "client": visit.client,
            "method": request.method[:MAX_TEXT],
            "path": request.raw_path[:MAX_TEXT],
            "status": visit.code,
            "bytes": visit.sent,
            "cache": visit.cache.value,
            "ms": round(seconds * 1000, 1),
            "agent": request.headers.get("User-Agent", "-")[:MAX_TEXT],
        }
        if visit.user is not None:
            fields["user"] = visit.user
        if visit.first_byte is not None:
            fields["first_byte_ms"] = round((visit.first_byte - visit.arrived) * 1000, 1)
        if visit.ask is not None:
            fields["upstream"] = visit.ask.upstream
            fields["repository"] = visit.ask.repository
            fields["queue_ms"] = round(visit.ask.timing.queue * 1000, 1)
        if visit.error is not None:
            fields["reason"] = visit.error.reason
            fields["error"] = str(visit.error)  # may say more than the client hears
        return fields
