"""Is it the origin that fails, or one repository of it? What may be held against everybody.

Why: a repository can be broken by itself. Its index is damaged, or the registry behind it is gone,
and each request for it ends in 500 however few there are at once. Held against the origin it would
keep the cap at one, open the breaker and pause everybody, for as long as one client insists.

The sign is that others are answered. A repository *fails by itself* when it failed, then another
one that was asked after that was answered, and now it fails again: with the load it failed under,
others go well. It stays so until it is answered, while another has been answered ``LATELY``; when
nobody else is, there is nothing to tell it from the origin, and its failures are the origin's.

An overload tells the same story once in a while, of a repository with bad luck twice. That loses
one sign of several: its next one is asked with fewer at once, and is answered.
"""

from __future__ import annotations

from collections import OrderedDict

#: Repositories that fail, of which the beginning is remembered; the earliest are forgotten first.
KEPT = 256
#: Seconds for which an answer to another repository is evidence.
LATELY = 30.0


class Blame:
    """Which repositories of one origin fail by themselves. All times are monotonic seconds."""

    def __init__(self) -> None:
        self._since: OrderedDict[str, float] = OrderedDict()  # their failures in a row began
        self._answered_at = float("-inf")
        self._sent_at = float("-inf")  # of the request that was sent last of those answered

    def answered(self, repository: str, now: float, *, sent_at: float) -> None:
        """A request for ``repository`` that was sent at ``sent_at`` was answered."""
        self._since.pop(repository, None)
        self._answered_at = now
        self._sent_at = max(self._sent_at, sent_at)

    def failed(self, repository: str, now: float, *, sent_at: float) -> bool:
        """One failed; does ``repository`` fail by itself?"""
        since = self._since.setdefault(repository, now)
        if len(self._since) > KEPT:
            self._since.popitem(last=False)
        return sent_at > since and self.fails_by_itself(repository, now)

    def fails_by_itself(self, repository: str, now: float) -> bool:
        """Were others answered since it began to fail, and lately?

        An answer to itself would have ended its failures.
        """
        since = self._since.get(repository)
        if since is None or now - self._answered_at > LATELY:
            return False
        return self._sent_at > since

    def __repr__(self) -> str:
        return f"<Blame {len(self._since)} repositories fail>"
