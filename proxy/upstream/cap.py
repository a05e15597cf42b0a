"""How many sockets an origin takes before it breaks: the control law of the effective cap (D6).

Pure: one value, three things that can happen to it. ``max_connections`` is what the operator
allows; the *effective cap* is what the upstream has shown to stand. It starts low and doubles per
round until the first overload, like TCP's slow start; after that it halves on overload and grows by
one after a run of successes, so that it hovers below the level that broke.

A success is the head of an answer, and a round is as many as fill the cap, which are all but the
slot that is kept for metadata: of a large blob in segments (D9) three heads double a cap of four,
that of the lead among them, which was answered before anything filled the cap: what came at this
cap and still comes when it is full counts then (``counts_late``). Each counts once, and no less
than a round does: an upstream whose bodies all stall keeps their slots, so the round at the next
cap is never full, and it is asked for no more than twice.

Four refinements, each against a way in which the plain law fails:

* *One halving per cause.* Requests that were sent before the last change say nothing about the new
  cap: an upstream that breaks under eight requests answers several of them badly at once.
* *One ceiling per row.* Until something that was sent after a halving has gone well, the upstream
  may still be at work on what broke it: the cap is halved on, but the ceiling stays where the first
  of such a row put it, and it is soon back below that. Otherwise an upstream that takes two seconds
  to recover would be held to one request at a time, whatever it stands.
* *Growth only when it is used.* A success counts when the cap was full as it was sent, or is while
  its body comes; otherwise a quiet night would raise a cap that nobody has tried.
* *A remembered ceiling.* The run is short below the level that broke last and long at it, so that
  the cap returns quickly to what worked and tries the wall rarely. A wall that has moved is found
  by passing it: then the ceiling is forgotten and the cap doubles again.

Two things happen to a cap besides. A *restart*: what the process before knew is where it begins, if
it is young. An older one is not believed: who else uses the upstream, and how large it is, changes
within days, a slow start finds out in seconds, and a cap that is believed for too low costs every
pull. It still bounds the start from above. An *outage*: requests to an origin that is down fail as
if each were one too many, and the cap falls to one; but how many it stands was known before, and
once it is back the cap starts low again under the ceiling of old.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

#: The first cap of an origin that nothing is known of (D6).
START = 4
#: From this cap on one slot is kept for metadata (D3).
KEEPS = 4
#: Seconds that a cap of an earlier process is believed.
BELIEVED = 86_400.0
#: Successes for one step up, per slot of the cap, below the level that broke last …
QUICK_RUN = 2
#: … and at it, where every step is likely to cost overload answers: at a cap of 6 one try in 384 …
SLOW_RUN = 64
#: … and never fewer than these, or a cap of 1 would try too often.
LEAST_SLOW_RUN = 256


@dataclass(frozen=True, slots=True)
class Learned:
    """What an earlier process knew: the cap, the least one that broke, and how many seconds ago."""

    limit: int
    ceiling: int | None
    age: float


@dataclass(frozen=True, slots=True)
class Cap:
    """The effective cap of one origin. Times are monotonic seconds."""

    limit: int
    maximum: int
    ceiling: int | None = None  # the least cap that broke, as far as is known
    run: int = 0  # successes at a full cap since the last change
    changed_at: float = float("-inf")
    is_proved: bool = True  # has anything gone well that was sent since it was halved?
    reason: str = "at its start"

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= self.maximum:
            raise ValueError(f"expected 1 <= limit <= {self.maximum}, got {self.limit}")

    @classmethod
    def starting(cls, maximum: int, learned: Learned | None = None) -> Cap:
        """The cap at start; with ``learned``, what an earlier process ended with.

        What it knew may lie outside of what the operator allows now.
        """
        low = min(START, maximum)
        if learned is None:
            return cls(low, maximum)
        limit = max(1, min(learned.limit, maximum))
        if not 0 <= learned.age <= BELIEVED:  # below zero: the wall clock was set back
            return cls(min(low, limit), maximum, reason="at its start: what was learned is too old")
        ceiling = learned.ceiling
        if ceiling is not None and not limit < ceiling <= maximum:
            ceiling = None
        return cls(limit, maximum, ceiling, reason="learned before the restart")

    def after_outage(self, now: float) -> Cap:
        """This cap, of before the origin went down, now that it is back."""
        limit = min(self.limit, START)
        return replace(
            self, limit=limit, run=0, changed_at=now, is_proved=True, reason="back after an outage"
        )

    def cleared(self, before: Cap, now: float) -> Cap:
        """This cap, when it turns out that nothing was wrong with ``before``."""
        if self.limit >= before.limit:
            return self
        return replace(before, run=0, changed_at=now, is_proved=True, reason="fewer were no help")

    @property
    def needed_run(self) -> int:
        """Successes at a full cap that the next step up takes."""
        if self.ceiling is None:
            return self.limit - 1 if self.limit >= KEEPS else self.limit  # one round
        if self.limit + 1 < self.ceiling:
            return QUICK_RUN * self.limit
        return max(LEAST_SLOW_RUN, SLOW_RUN * self.limit)

    def succeeded(self, now: float, *, sent_at: float, full: bool) -> Cap:
        """A request that was sent at ``sent_at`` went well; ``full`` says that the cap was the
        limit then."""
        if not self.is_proved:
            if sent_at <= self.changed_at:
                return self
            return replace(self, is_proved=True).succeeded(now, sent_at=sent_at, full=full)
        if not full or self.limit == self.maximum:
            return self
        if self.run + 1 < self.needed_run:
            return replace(self, run=self.run + 1)
        return self._raised(now)

    def counts_late(self, sent_at: float) -> bool:
        """Does an answer to what was sent then, before the cap was full, count now that it is, and
        its body still comes? Not if the cap was another one: others were on their way then."""
        return sent_at > self.changed_at

    def _raised(self, now: float) -> Cap:
        step = self.limit if self.ceiling is None else 1
        limit = min(self.maximum, self.limit + step)
        passed = self.ceiling is not None and limit > self.ceiling
        return replace(
            self,
            limit=limit,
            ceiling=None if passed else self.ceiling,
            run=0,
            changed_at=now,
            is_proved=True,
            reason="growing",
        )

    def overloaded(self, now: float, *, sent_at: float, reason: str) -> Cap:
        """The upstream broke under a request that was sent at ``sent_at``."""
        if sent_at <= self.changed_at and self.ceiling is not None:
            return replace(self, run=0)
        return replace(
            self,
            limit=max(1, self.limit // 2),
            ceiling=self.limit if self.is_proved else self.ceiling,
            run=0,
            changed_at=now,
            is_proved=False,
            reason=reason,
        )
