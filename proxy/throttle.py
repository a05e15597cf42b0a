"""A cap on bytes a second, shared fairly by the streams that pass through it.

Theory of operation
-------------------
A *throttle* is one cap: of an upstream (``max_rate``), a client (``client_rate``), or all that goes
from here to other nodes, or comes from them. A *stream* is one body that passes through it, in
pieces of at most ``piece`` bytes, but for what comes from nodes: of that as much as is of use when
it is whole. What is sent is taken out of the throttle before it goes; what an upstream sends once
it has come, and before more is read, so that TCP holds back what was not paid for; what a node
sends before it is waited for.

``Allowance`` is the token bucket: it fills at the rate, holds ``BURST`` seconds' worth and may be
overdrawn by one piece, so that no piece has to wait for more than there can ever be. ``TapQueue``
is the order: each stream has a *tag*, the bytes it has taken, counted from where the queue stood
when it came; the lowest tag goes next. So streams that want all they can get have equal shares in
bytes, whatever the size of their pieces, and one that wants little finds itself in front. What
*goes on* with something that is of no use before it is whole is in front of all tags. *Prompt*
streams (manifests) go before all others and may overdraw a second's worth: they do not wait behind
bulk, and bulk pays for them; a crowd of nothing but manifests still keeps to the cap. It is clients
who choose what is prompt (a listing may have megabytes, and be asked for again and again), so while
bulk waits prompt streams get ``PROMPT_SHARE`` of the bytes at most: each of their bytes makes bulk
*owed* a part of one, and as soon as that is its next piece, this goes first, overdrawing as well.

Both are pure and told the time. ``Throttle`` waits: who can take at once does so without a future;
else one timer, for when the allowance is above zero again, wakes as many as it then lets through.

Why not aiolimiter: it lets small amounts and newcomers overtake, so that a large piece may wait for
ever; it refuses an amount above its burst; and it knows nobody's share.

A waiter that is cancelled is passed over. One whose turn had come in the same loop turn has taken
its bytes already and gives them back.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

#: Seconds' worth that an idle throttle saves up, and that one piece is.
BURST = 0.05
#: Seconds' worth that prompt streams may take in advance.
PROMPT_DEBT = 1.0
#: What prompt streams get at most while bulk waits.
PROMPT_SHARE = 0.75
#: Seconds that a timer is set for at least: loops count in milliseconds.
LEAST_DELAY = 0.001
#: Less than any tag.
FIRST = -1.0
MIN_PIECE = 1 << 10
MAX_PIECE = 1 << 20

Waiter = TypeVar("Waiter")


class Allowance:
    """The bytes that may move now; below zero when more have moved than should have."""

    def __init__(self, rate: float, now: float) -> None:
        """``rate`` in bytes a second."""
        if rate <= 0:
            raise ValueError(f"a throttle needs a rate above zero, not {rate}")
        self.rate = rate
        self._most = max(rate * BURST, 1.0)
        self._level = self._most
        self._since = now

    def level(self, now: float) -> float:
        """Bytes that are left, as of ``now``."""
        if now > self._since:
            self._level = min(self._most, self._level + (now - self._since) * self.rate)
            self._since = now
        return self._level

    def take(self, count: int, now: float) -> None:
        self._level = self.level(now) - count

    def give_back(self, count: int) -> None:
        self._level = min(self._most, self._level + count)

    def is_full(self, now: float) -> bool:
        """Is a new one no better than this one?"""
        return self.level(now) >= self._most


class TapQueue(Generic[Waiter]):
    """Waiters in the order of prompt before bulk, then of the bytes their streams have had; but for
    bulk that is owed."""

    def __init__(self) -> None:
        self._prompt: list[tuple[float, int, int, Waiter]] = []
        self._bulk: list[tuple[float, int, int, Waiter]] = []
        self._number = 0
        self._reached = 0.0  # the tag at which bytes were taken last
        self._owed = 0.0  # bytes that bulk may take before prompt ones take more

    def __len__(self) -> int:
        return len(self._prompt) + len(self._bulk)

    def tag(self, of_stream: float) -> float:
        """Where a stream stands now: what it missed while it wanted nothing is not made up for."""
        return max(of_stream, self._reached)

    def add(self, waiter: Waiter, tag: float, count: int, *, prompt: bool) -> None:
        """``count``: the bytes it waits for."""
        self._number += 1
        heapq.heappush(self._prompt if prompt else self._bulk, (tag, self._number, count, waiter))

    @property
    def _is_owed(self) -> bool:
        return bool(self._bulk) and self._owed >= self._bulk[0][2]

    def first(self) -> tuple[Waiter, bool]:
        """Who goes next, and whether it may overdraw as prompt ones do. There must be one."""
        if self._prompt and not self._is_owed:
            return self._prompt[0][3], True
        return self._bulk[0][3], self._is_owed

    def pop(self) -> None:
        """Remove who goes next."""
        if self._prompt and not self._is_owed:
            heapq.heappop(self._prompt)
        else:
            heapq.heappop(self._bulk)

    def passed(self, tag: float, count: int, *, prompt: bool) -> None:
        """A stream at ``tag`` has taken ``count`` bytes."""
        if prompt:
            share = (1 - PROMPT_SHARE) / PROMPT_SHARE
            self._owed = self._owed + count * share if self._bulk else 0.0
        else:
            self._reached = max(self._reached, tag)
            self._owed = max(0.0, self._owed - count)


class Stream:
    """One body's way through a throttle. Used by one task at a time."""

    __slots__ = ("prompt", "tag", "throttle")

    def __init__(self, throttle: Throttle, *, prompt: bool) -> None:
        self.throttle = throttle
        self.prompt = prompt
        self.tag = 0.0

    @property
    def piece(self) -> int:
        """Bytes to take at once, at most."""
        return self.throttle.piece

    async def take(self, count: int, *, goes_on: bool = False) -> None:
        """Wait until ``count`` bytes may move; cancelling it leaves no trace. What ``goes_on`` is
        the rest of something that is of no use before it is whole: nothing else of its kind goes
        first."""
        await self.throttle.take(self, count, goes_on=goes_on)


class _Waiter:
    __slots__ = ("count", "future", "stream")

    def __init__(self, stream: Stream, count: int) -> None:
        self.stream = stream
        self.count = count
        self.future: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Throttle:
    """A cap on bytes a second for all the streams that pass through it."""

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float],
        on_wait: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        """``rate`` in bytes a second; ``on_wait`` hears how long each wait was."""
        self.rate = rate
        self.piece = int(min(MAX_PIECE, max(MIN_PIECE, rate * BURST)))
        self.streams = 0  # for whoever keeps many throttles
        self._allowance = Allowance(rate, clock())
        self._clock = clock
        self._on_wait = on_wait
        self._queue: TapQueue[_Waiter] = TapQueue()
        self._timer: asyncio.TimerHandle | None = None

    def stream(self, *, prompt: bool) -> Stream:
        """One more body; ``prompt`` ones do not wait for bulk."""
        return Stream(self, prompt=prompt)

    @property
    def waiting(self) -> int:
        """Streams that wait."""
        return len(self._queue)

    @property
    def is_fresh(self) -> bool:
        """Is a new throttle no better than this one?"""
        return not self._queue and self._allowance.is_full(self._clock())

    async def take(self, stream: Stream, count: int, *, goes_on: bool = False) -> None:
        """See ``Stream.take``."""
        stream.tag = self._queue.tag(stream.tag)
        if self._missing(stream.prompt) < 0 and not self._is_behind(stream.prompt):
            self._take(stream, count)
            return
        waiter, began = _Waiter(stream, count), self._clock()
        tag = FIRST if goes_on else stream.tag
        self._queue.add(waiter, tag, count, prompt=stream.prompt)
        self._arm()
        try:
            await waiter.future
        except BaseException:
            # False if the bytes have been taken, or if it was cancelled already.
            if not waiter.future.cancel() and not waiter.future.cancelled():
                self._allowance.give_back(count)
                self._serve()
            raise
        self._on_wait(self._clock() - began)

    def _is_behind(self, prompt: bool) -> bool:
        """Does somebody wait whom one of this kind must not overtake?"""
        return len(self._queue) > 0 and (not prompt or self._queue.first()[1])

    def _missing(self, ahead: bool) -> float:
        """Bytes by which the allowance is too low for anybody to take any; ``ahead``: of those who
        may overdraw it."""
        floor = -max(self.rate * PROMPT_DEBT, 2.0 * self.piece) if ahead else 0.0
        return floor - self._allowance.level(self._clock())

    def _take(self, stream: Stream, count: int) -> None:
        self._allowance.take(count, self._clock())
        self._queue.passed(stream.tag, count, prompt=stream.prompt)
        stream.tag += count

    def _serve(self) -> None:
        """Let through as many as the allowance lets, in their order."""
        while self._queue:
            waiter, ahead = self._queue.first()
            if not waiter.future.done() and self._missing(ahead) >= 0:
                break
            self._queue.pop()
            if not waiter.future.done():
                self._take(waiter.stream, waiter.count)
                waiter.future.set_result(None)
        self._arm()

    def _arm(self) -> None:
        """Have one timer while somebody waits, and none else."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._queue:
            _, ahead = self._queue.first()
            delay = max(LEAST_DELAY, self._missing(ahead) / self.rate)
            self._timer = asyncio.get_running_loop().call_later(delay, self._serve)

    def __repr__(self) -> str:
        level = self._allowance.level(self._clock())
        return f"<Throttle {self.rate:.0f} B/s, {level:.0f} bytes left, {len(self._queue)} wait>"


class Throttles:
    """A throttle of the same rate for each of any number of parties.

    One that nobody passes through is kept until it is as good as new, so that a party that comes
    again and again gains nothing; it is looked for when there are twice as many as last time.
    """

    LEAST = 64

    def __init__(
        self,
        rate: float,
        *,
        clock: Callable[[], float],
        on_wait: Callable[[float], None] = lambda _seconds: None,
    ) -> None:
        """As of ``Throttle``."""
        self._rate = rate
        self._clock = clock
        self._on_wait = on_wait
        self._throttles: dict[str, Throttle] = {}
        self._sweep_at = self.LEAST

    def __len__(self) -> int:
        return len(self._throttles)

    @contextlib.contextmanager
    def stream(self, party: str, *, prompt: bool) -> Iterator[Stream]:
        """One more body of this party's, until the block ends."""
        throttle = self._throttles.get(party)
        if throttle is None:
            self._sweep()
            throttle = Throttle(self._rate, clock=self._clock, on_wait=self._on_wait)
            self._throttles[party] = throttle
        throttle.streams += 1
        try:
            yield throttle.stream(prompt=prompt)
        finally:
            throttle.streams -= 1

    def _sweep(self) -> None:
        if len(self._throttles) < self._sweep_at:
            return
        known = self._throttles.items()
        self._throttles = {party: t for party, t in known if t.streams or not t.is_fresh}
        self._sweep_at = max(self.LEAST, 2 * len(self._throttles))

    def __repr__(self) -> str:
        return f"<Throttles {self._rate:.0f} B/s for each of {len(self)}>"
