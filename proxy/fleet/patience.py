"""How long a node waits until it asks the directory again, if nothing happens to it meanwhile.

What ends here leads to a question anyway, so a wait is only for what others do: publish the next
stripe, have something to give again, cease to fill. A node learns how often that is from how often
it asked in vain: its *patience* grows each time, and is halved by news. The more stripes are on
their way to it, the less it misses by hearing of the next one late.

In a crowd all are more patient, or the directory would do nothing but answer them; and one that
answers late is left in peace for a while.
"""

from __future__ import annotations

import random

#: Seconds that a node waits for news at first; and at most, if nothing is on its way.
FIRST_LOOK, LAST_LOOK = 0.05, 0.25
#: With each stripe that is on its way it may wait as long again, up to this.
MOST_PATIENT = 1.0
#: So many nodes may look that often; of more each one looks less often.
LOOKERS = 64
#: In a crowd of so many an answer of the directory that takes longer than PROMPT seconds shows that
#: it is busy: for so many times as long as that it is left in peace.
PROMPT, PEACE = 0.02, 3.0
#: No wait is longer: leases have to be renewed.
LONGEST = 2.0


class Patience:
    """Of one node with one blob."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seconds = FIRST_LOOK
        self._quiet_until = 0.0

    def __repr__(self) -> str:
        return f"<Patience {self._seconds:.2f} s>"

    def learned(self, *, is_news: bool, receiving: int) -> None:
        """The directory has answered, while so many stripes were on their way."""
        if is_news:
            self._seconds = max(FIRST_LOOK, self._seconds / 2)
        else:
            most = min(MOST_PATIENT, LAST_LOOK * (1 + receiving))
            self._seconds = min(most, 2 * self._seconds)

    def answered(self, seconds: float, nodes: int, now: float) -> None:
        """It took so long for a call. With few nodes that is not its own doing."""
        if nodes >= LOOKERS:
            self._quiet_until = now + min(LONGEST, PEACE * max(0.0, seconds - PROMPT))

    def is_over(self, now: float) -> bool:
        """May it be asked, or is it to be left in peace?"""
        return now >= self._quiet_until

    def wait(self, nodes: int, now: float) -> float:
        """Seconds until the next question, of one of so many nodes."""
        crowd = FIRST_LOOK * nodes / LOOKERS
        wait = max(self._seconds, crowd) * self._rng.uniform(0.5, 1.0)
        return min(LONGEST, max(wait, self._quiet_until - now))
