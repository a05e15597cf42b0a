"""A token that grants nothing: is that for want of rights, or of time? Evidence of either (D5).

Harbor answers both alike, so one answer proves nothing; what it says of others at the same time
does.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
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
#: Seconds until the same refusal would be doubted again.
_DOUBTED_FOR = 60.0

IsGranted = Callable[[str | None], Awaitable[bool]]
"""Does the token service give access to this repository now, or with None any token at all?"""


class Evidence(Enum):
    """What a token that grants nothing is for."""

    DENIAL = "there are no rights"
    OVERLOAD = "there was no time"
    NONE = "nobody knows yet"


class Witnesses:
    """The repositories of one upstream that could be pulled from, and those in doubt.

    ``clock`` is monotonic, in seconds.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._worked: TTLCache[str, float] = TTLCache(_KEPT, _LATELY, timer=clock)
        self._doubted: TTLCache[str, float] = TTLCache(_KEPT, _DOUBTED_FOR, timer=clock)

    def worked(self, repository: str) -> bool:
        """The upstream has just granted access to ``repository``; whether it was in doubt, so that
        an earlier refusal was for want of time."""
        self._worked[repository] = self._clock()
        return self._doubted.pop(repository, None) is not None

    async def weigh(
        self,
        repository: str,
        ask: IsGranted,
        *,
        is_anonymous: bool,
        is_stressed: Callable[[], bool],
    ) -> Evidence:
        """A token came without access to ``repository``: what for?

        The first look at a repository that has not worked yet is no evidence: whoever wants to know
        asks again after a pause, which is the second chance of a denial. Then, in this order:
        another token; credentials that do not even get a token without a scope are wrong; and if
        others that worked fail as well, it is not about this one. Several of them are asked, for
        one may have been revoked itself. Where nothing else has worked there is only what this one
        did. While the upstream ``is_stressed`` (was overloaded a moment ago), and for what worked
        lately, bad luck looks like a denial for a while longer. Raises as ``ask`` does.
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
        is_granted = await self._any_granted(others, ask)
        if not is_granted and (others or has_worked):
            return Evidence.OVERLOAD
        # Asked last: others may have met an overload while this one was being looked into.
        may_be_luck = is_stressed() or has_worked or not others
        if may_be_luck and doubted < DOUBT:
            return Evidence.NONE
        self._worked.pop(repository, None)
        return Evidence.DENIAL

    async def _any_granted(self, others: Sequence[str], ask: IsGranted) -> bool:
        """Is one of these granted still? Those before it were not: they have worked no longer."""
        for place, other in enumerate(others):
            if await ask(other):
                for failed in others[:place]:
                    self._worked.pop(failed, None)
                return True
        return False

    def __repr__(self) -> str:
        return f"<Witnesses {len(self._worked)} worked, {len(self._doubted)} in doubt>"
