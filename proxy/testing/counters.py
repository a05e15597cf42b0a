"""What the fake saw, counted where an upstream would count it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from proxy.oci.digest import Digest
from proxy.testing.wire import Asked, Kind


@dataclass(slots=True)
class Moment:
    """When a request arrived, in seconds by the registry's clock, and what overload made of it.

    `overload` is a `Misbehaviour`, `POISONED_TOKEN` for a request refused because of a token that
    overload had emptied, None for any honest answer.
    """

    at: float
    overload: str | None = None


@dataclass(slots=True)
class Seen:
    """One request that arrived. `status` is None until an answer's headers leave.

    `headers` ignores case; `query` gives the first value of each name.
    """

    kind: Kind
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    moment: Moment
    status: int | None = None


class Counters:
    """Totals since the start or the last `reset()`.

    - `requests`: every request that arrived, by (kind, method), the refused ones included.
    - `gets`: GETs that passed limit and authentication, by the digest they meant.
    - `bytes_sent`, `bytes_by_digest`: body bytes of blobs and manifests given to the kernel; of a
      piece that a lost connection cut short, only what had left by then.
    - `refused`: requests answered with the over-limit status.
    - `peak_sockets`: most sockets ESTABLISHED at once, measured at each accept.
    - `accepted`: sockets accepted.
    - `peak_requests`: most requests in progress at once, those that overload struck left out.
    - `overloads`: requests that overload struck, and those refused for a token that it had emptied,
      by kind; `timeline`: when every request arrived, and that kind.
    - `tokens_issued`: 200s of the token service, tokens without access included.
    - `authorization_leaks`: requests for a signed URL that carried an Authorization header.
    - `seen`: every request in order of arrival, when the registry keeps them.
    """

    def __init__(
        self,
        established: Callable[[], int],
        *,
        keep_seen: bool = True,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._established = established
        self._clock = clock
        self._keep_seen = keep_seen
        self.reset()

    def reset(self) -> None:
        """Start anew; sockets that are open now stay counted in the peak."""
        self.requests: Counter[tuple[Kind, str]] = Counter()
        self.gets: Counter[Digest] = Counter()
        self.bytes_by_digest: Counter[Digest] = Counter()
        self.bytes_sent = 0
        self.raw_bytes = 0  # of raw answers, as far as the kernel took them
        self.refused = 0
        self.tokens_issued = 0
        self.authorization_leaks = 0
        self.peak_sockets = self._established()
        self.accepted = 0
        self.peak_requests = 0
        self.overloads: Counter[str] = Counter()
        self.timeline: list[Moment] = []
        self.seen: list[Seen] = []

    @property
    def sockets_now(self) -> int:
        """Sockets ESTABLISHED now: accepted, and closed by neither side."""
        return self._established()

    @property
    def heads(self) -> int:
        """HEAD requests of every kind."""
        return sum(count for (_, method), count in self.requests.items() if method == "HEAD")

    @property
    def manifests(self) -> int:
        """GETs for manifests."""
        return self.count(Kind.MANIFEST, "GET")

    def count(self, kind: str, method: str | None = None) -> int:
        """Requests of a kind, of one method or of all. Raises ValueError for an unknown kind."""
        wanted = Kind(kind)
        return sum(
            count
            for (asked, verb), count in self.requests.items()
            if asked is wanted and method in (None, verb)
        )

    def note_request(self, asked: Asked) -> Seen:
        """Count an arrival; the caller fills in the status."""
        self.requests[asked.kind, asked.method] += 1
        moment = Moment(self._clock())
        self.timeline.append(moment)
        seen = Seen(asked.kind, asked.method, asked.path, dict(asked.query), asked.headers, moment)
        if self._keep_seen:
            self.seen.append(seen)
        return seen

    def note_body(self, content: Digest | None, count: int) -> None:
        """Count body bytes, if they belong to a blob or manifest."""
        if content is not None:
            self.bytes_sent += count
            self.bytes_by_digest[content] += count

    def note_raw(self, count: int) -> None:
        """Count bytes of a raw answer."""
        self.raw_bytes += count

    def note_accept(self, established: int) -> None:
        """Count a socket and remember the peak."""
        self.accepted += 1
        self.peak_sockets = max(self.peak_sockets, established)

    def note_progress(self, in_progress: int) -> None:
        """Remember the peak."""
        self.peak_requests = max(self.peak_requests, in_progress)

    def note_overload(self, seen: Seen, kind: str) -> None:
        """Count a request that got something for being one too many."""
        self.overloads[kind] += 1
        seen.moment.overload = kind

    def timeline_as_json(self) -> list[tuple[float, str | None]]:
        """Each request's seconds since the first one, and what overload made of it, in order."""
        start = self.timeline[0].at if self.timeline else 0.0
        return [(moment.at - start, moment.overload) for moment in self.timeline]

    def as_json(self) -> dict[str, object]:
        """All totals in plain JSON types; `requests` by "kind METHOD"."""
        return {
            "requests": {f"{kind} {verb}": count for (kind, verb), count in self.requests.items()},
            "gets": {str(digest): count for digest, count in self.gets.items()},
            "bytes_by_digest": {str(name): count for name, count in self.bytes_by_digest.items()},
            "bytes_sent": self.bytes_sent,
            "refused": self.refused,
            "sockets_now": self.sockets_now,
            "peak_sockets": self.peak_sockets,
            "accepted": self.accepted,
            "peak_requests": self.peak_requests,
            "overloads": dict(self.overloads),
            "tokens_issued": self.tokens_issued,
            "authorization_leaks": self.authorization_leaks,
            "heads": self.heads,
            "manifests": self.manifests,
        }

    def __repr__(self) -> str:
        return (
            f"<Counters {self.requests.total()} requests, {self.bytes_sent} bytes, "
            f"peak {self.peak_sockets} sockets, {self.refused} refused>"
        )
