"""Docker Hub's quota of pulls, as it counts and tells them.

A GET of a manifest is a pull; a HEAD is not, and says the same headers. Beyond the limit a GET gets
429 until the window is over; blobs, tokens and HEADs are answered as ever. The window begins with
the first pull after the one before has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from proxy.testing.wire import Asked, Kind, Reply, error_reply


@dataclass(frozen=True, slots=True)
class PullQuota:
    """At most `limit` pulls in `window` seconds; `retry_after` seconds are told to who is refused,
    if any."""

    limit: int
    window: float = 21_600.0
    retry_after: float | None = None


class PullCounter:
    """What is left of a quota. `clock` gives seconds."""

    def __init__(self, quota: PullQuota | None, clock: Callable[[], float]) -> None:
        self.quota = quota
        self.spent = 0
        self._clock = clock
        self._ends = float("-inf")

    @property
    def remaining(self) -> int:
        """Pulls left in this window."""
        if self.quota is None:
            return 0
        if self._clock() >= self._ends:
            self.spent = 0
        return max(0, self.quota.limit - self.spent)

    def count(self, asked: Asked) -> Reply | None:
        """Spend a pull if this is one; the refusal if none is left."""
        if self.quota is None or asked.kind is not Kind.MANIFEST or asked.method != "GET":
            return None
        if not self.remaining:
            headers = dict(self.headers())
            if self.quota.retry_after is not None:
                headers["Retry-After"] = f"{self.quota.retry_after:.0f}"
            text = "You have reached your pull rate limit"
            return error_reply(429, "TOOMANYREQUESTS", text, headers)
        if not self.spent:
            self._ends = self._clock() + self.quota.window
        self.spent += 1
        return None

    def told(self, asked: Asked, reply: Reply) -> Reply:
        """The reply with what is left, where Docker Hub says it."""
        if self.quota is None or asked.kind is not Kind.MANIFEST:
            return reply
        return replace(reply, headers={**reply.headers, **self.headers()})

    def headers(self) -> Mapping[str, str]:
        if self.quota is None:
            return {}
        window = f";w={self.quota.window:.0f}"
        return {
            "ratelimit-limit": f"{self.quota.limit}{window}",
            "ratelimit-remaining": f"{self.remaining}{window}",
        }
