"""A token that grants nothing: is that for want of rights, or of time? Evidence of either (D5).

Harbor answers both alike, so one answer proves nothing; what it says at the same time of others,
the *witnesses*, does. A repository is one when it could be pulled from lately.

Witnesses age. When none of those that are asked is granted, that is an overload, or their rights
are gone as well: the only one was revoked, or the account lost all it had. It is an overload until
it has lasted for ``BARREN`` seconds and ``BARREN_ROUNDS`` rounds of questions *in quiet*, that is
with nothing else of ours under way: an overload that we make gives way then, since somebody is
always served who comes alone, and one that others make shows in other signs (statuses, resets,
database text), which void what was found so far. What is not granted by then is no witness any
more, whatever an old token still opens, until the token service grants it anew.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from cachetools import TTLCache

# How long it counts as evidence, in seconds, that a repository could be pulled from.
_LATELY = 600.0
# Repositories that are remembered at most.
_KEPT = 1024

#: Seconds after which a repository that was refused is looked at again …
SECOND_LOOK = 1.0
#: … and until a refusal that may be bad luck is taken for a denial, which is due within 5 s.
DOUBT = 2.0
#: Other repositories that are asked for as evidence, at most.
OTHERS = 3
#: Seconds, and rounds of questions in quiet, after which none of them is taken for a witness.
BARREN = 2.0
BARREN_ROUNDS = 3
#: Seconds until the same refusal would be doubted again.
_DOUBTED_FOR = 60.0

IsGranted = Callable[[str | None], Awaitable[bool]]
"""Does the token service give access to this repository now, or with None any token at all?"""


class Evidence(Enum):
    """What a token that grants nothing is for."""

    DENIAL = "there are no rights"
    REVOKED = "there are no rights any more, to anything that was asked for"
    OVERLOAD = "there was no time"
    NONE = "nobody knows yet"


@dataclass(frozen=True, slots=True)
class _Barren:
    """No witness has been granted since then, in so many rounds in quiet."""

    since: float
    rounds: int = 0

    def is_proved(self, now: float) -> bool:
        return self.rounds >= BARREN_ROUNDS and now - self.since >= BARREN


class Witnesses:
    """The repositories of one upstream that could be pulled from, and those in doubt.

    ``clock`` is monotonic, in seconds.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._worked: TTLCache[str, float] = TTLCache(_KEPT, _LATELY, timer=clock)
        self._doubted: TTLCache[str, float] = TTLCache(_KEPT, _DOUBTED_FOR, timer=clock)
        self._revoked: TTLCache[str, bool] = TTLCache(_KEPT, _LATELY, timer=clock)
        self._barren: TTLCache[str, _Barren] = TTLCache(1, _DOUBTED_FOR, timer=clock)

    def worked(self, repository: str) -> bool:
        """The upstream has just granted access to ``repository``; whether it was in doubt, so that
        an earlier refusal was for want of time."""
        if repository not in self._revoked:
            self._worked[repository] = self._clock()
        return self._doubted.pop(repository, None) is not None

    def granted(self, repository: str) -> None:
        """The token service has just granted access to ``repository``."""
        self._revoked.pop(repository, None)
        self._barren.clear()

    async def weigh(
        self,
        repository: str,
        ask: IsGranted,
        *,
        is_anonymous: bool,
        is_stressed: Callable[[], bool],
        is_quiet: Callable[[], bool],
    ) -> Evidence:
        """A token came without access to ``repository``: what for?

        The first look at a repository that has not worked yet is no evidence: whoever wants to know
        asks again after a pause, which is the second chance of a denial. Then, in this order:
        another token; credentials that do not even get a token without a scope are wrong; and if
        others that worked fail as well, it is not about this one. Several of them are asked, for
        one may have been revoked itself. If one is granted this one is asked for once more: only
        what is refused before and after that has no rights, and has not just come too early. Where
        nothing else has worked there is only what this one did. While the upstream ``is_stressed``
        (showed an overload in other ways a moment ago), and for what worked lately, bad luck looks
        like a denial for a while longer. ``is_quiet``: nothing else is asked of the upstream now.
        Raises as ``ask`` does.
        """
        has_worked = repository in self._worked
        doubted = self._clock() - self._doubted.setdefault(repository, self._clock())
        if not has_worked and doubted < SECOND_LOOK:
            return Evidence.NONE
        if await ask(repository):
            return Evidence.OVERLOAD
        if not is_anonymous and not await ask(None):
            return Evidence.DENIAL
        others = [name for name in reversed(list(self._worked)) if name != repository][:OTHERS]
        if (others or has_worked) and not await self._any_granted(others, ask):
            return self._judge_barren((repository, *others), is_stressed(), is_quiet())
        # Asked last: others may have met an overload while this one was being looked into.
        may_be_luck = is_stressed() or has_worked or not others
        if may_be_luck and doubted < DOUBT:
            return Evidence.NONE
        # There may be time for the others' tokens because transfers have ended since its own.
        if others and await ask(repository):
            return Evidence.OVERLOAD
        self._forget(repository)
        return Evidence.DENIAL

    def _judge_barren(self, asked: Sequence[str], is_stressed: bool, is_quiet: bool) -> Evidence:
        """None of those ``asked`` for was granted: the verdict on the first."""
        now = self._clock()
        if is_stressed:
            self._barren.clear()
            return Evidence.OVERLOAD
        barren = self._barren.get("", _Barren(now))
        if is_quiet:
            barren = self._barren[""] = replace(barren, rounds=barren.rounds + 1)
        if barren.is_proved(now):
            for name in asked:
                self._forget(name)
            return Evidence.REVOKED
        # One at a time is no more than it may be.
        return Evidence.NONE if is_quiet else Evidence.OVERLOAD

    def _forget(self, repository: str) -> None:
        """It is no witness until it is granted anew."""
        if self._worked.pop(repository, None) is not None:
            self._revoked[repository] = True

    async def _any_granted(self, others: Sequence[str], ask: IsGranted) -> bool:
        """Is one of these granted still? Those before it were not: they have worked no longer."""
        for place, other in enumerate(others):
            if await ask(other):
                for failed in others[:place]:
                    self._forget(failed)
                return True
        return False

    def __repr__(self) -> str:
        return f"<Witnesses {len(self._worked)} worked, {len(self._doubted)} in doubt>"
