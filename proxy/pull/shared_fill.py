"""What a sharing has of its fill: ranges to bring, and the bytes that are there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from proxy.oci.digest import Chunk
from proxy.pull.intake import Intake
from proxy.pull.lending import apart
from proxy.pull.segments import Segment, Segments
from proxy.pull.spread import Spread
from proxy.store.blobs import FileLease, StoreFull


class SharedFill:
    """A ``Ground``: one fill, for as long as its plan is the one that is shared. When the fill has
    dropped that, because its upstream knows no ranges or the disk is full, its own turns bring all
    that is missing, and nobody else may bring anything."""

    def __init__(
        self,
        size: int,
        *,
        intake: Intake,
        spread: Spread,
        opened: Callable[[], Awaitable[None]],
        put: Callable[[Segment, list[Chunk]], Awaitable[None]],
        bound: Callable[[], None],
    ) -> None:
        """``opened`` sees to it that there is a place; ``put`` takes in bytes; ``bound`` is called
        when turns are to bring something else."""
        self._intake = intake
        self._spread = spread
        self._opened = opened
        self._put = put
        self._bound = bound
        self._plan = spread.share(size)

    def _laid(self) -> Segments:
        if self._spread.is_void or self._spread.plan is not self._plan:
            raise StoreFull("the flight goes on alone")
        return self._plan

    @property
    def has_place(self) -> bool:
        """See ``Ground``, here and below."""
        return self._intake.has_place

    def reached(self, position: int) -> int:
        if self._spread.plan is self._plan:
            return self._plan.done_after(position)
        return max(position, self._intake.received)

    def is_free(self, start: int, stop: int) -> bool:
        return self._laid().is_free(start, stop)

    def is_empty(self, start: int, stop: int) -> bool:
        return list(self._laid().gaps(start, stop)) == [(start, stop)]

    def claim(self, start: int, stop: int) -> Segment:
        return self._laid().claim(start, stop)

    async def put(self, segment: Segment, chunks: Sequence[Chunk]) -> None:
        await self._opened()
        end = segment.at + sum(map(len, chunks))
        with self._spread.putting():
            while segment.at < end:
                start, stop = next(self._laid().gaps(segment.at, end), (end, end))
                _, chunks = apart(chunks, start - segment.at)
                self._spread.wrote(segment, start - segment.at)  # earlier, by a turn
                head, chunks = apart(chunks, stop - start)
                if head:
                    await self._put(segment, head)

    def give_back(self, segment: Segment) -> None:
        self._spread.ended(segment)

    def bind(self, start: int, stop: int) -> None:
        self._spread.bind(start, stop)
        self._bound()

    def unbind(self) -> None:
        self._spread.unbind()

    def lend(self) -> FileLease:
        return self._intake.lend()

    def __repr__(self) -> str:
        return f"<SharedFill {self._plan!r}>"
