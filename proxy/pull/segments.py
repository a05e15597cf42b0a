"""Which bytes of a blob each turn of its flight brings, when there may be several at once (D9).

Pure: no clock, no loop, no file. A *segment* is a bounded range that one turn brings in order, from
``start`` to ``stop``; ``at`` is how far it has come. Every byte of the blob is in one of three
places: *done* (written), *taken* (some segment's, and still to come), or in a *hole*.

* The next segment always begins at the first hole: readers follow in order, so what lies in front
  is worth most, and what lies in between is little.
* It is an equal cut of what is left in holes, as many as there may be segments. The last to begin
  are the smallest then, so all end at about the same time, and when a slot comes free in the middle
  there is something left for it. But a cut has ``least`` bytes, for each costs a request, and no
  more than its turn may have (D2), or where there are several a quarter of that.
* What a broken or cut segment did not bring is a hole again. So is the end of a long one that is
  *shortened*, because there are no other holes and somebody has nothing to do.
* With ``bounds`` only what lies between them is cut from holes: the rest is others' to bring, who
  ``claim`` a range that they have chosen themselves.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

from proxy.oci.digest import Chunk

#: A segment beside others is no longer than this part of a turn, which is 0.5 s: what comes behind
#: it waits for it before it is hashed and read. Shorter ones lose more by the way of each request.
TURN_PARTS = 4
#: Bytes that are written at once of what nobody waits for yet.
GATHER_BYTES = 1 << 20


class Segment:
    """A turn's range; ``stop`` is ``None`` when nobody knows where the blob ends."""

    __slots__ = ("asked", "at", "in_hand", "start", "stop")

    def __init__(self, start: int, stop: int | None) -> None:
        self.start = start
        self.at = start
        self.in_hand = start  # the end of the piece that is being written
        self.stop = stop
        self.asked = stop  # where what its turn has asked for ends

    @property
    def is_shortened(self) -> bool:
        """Has its turn asked for more than it is to bring?"""
        return self.stop is not None and self.stop != self.asked

    @property
    def is_cut(self) -> bool:
        """Has it brought all that it is to bring, though its turn has asked for more?"""
        return self.is_shortened and self.at >= _stop(self)

    def end_here(self) -> None:
        """Its turn brings no more than what is in hand and the next byte: a turn that brings none
        has failed."""
        self.stop = min(_stop(self), max(self.at, self.in_hand) + 1)

    def first_of(self, chunks: list[Chunk]) -> list[Chunk]:
        """What of the next bytes is to be written. Until that is done they are in hand: it cannot
        be shortened to less."""
        count = sum(map(len, chunks))
        left = min(count, _stop(self) - self.at) if self.is_shortened else count
        self.in_hand = self.at + left
        kept = []
        for chunk in chunks:
            kept.append(chunk[:left])
            left -= len(kept[-1])
        return kept

    def __repr__(self) -> str:
        return f"<Segment {self.start}-{self.stop} at {self.at}>"


def cut(hole: int, left: int, *, parts: int, least: int, most: int) -> int:
    """How much of a ``hole`` the next segment gets, with ``left`` bytes in all holes.

    What would be left of the hole is not cut off when it is a crumb.
    """
    wanted = min(most, max(least, -(-left // parts)))
    crumb = min(least, most) // 2
    return hole if hole <= wanted + crumb else wanted


def first_cut(left: int | None, *, parts: int, least: int, most: int) -> int:
    """How much the first turn asks for of a blob of which ``left`` bytes are to come, if anybody
    knows."""
    if left is None:
        return min(most, least)
    length = cut(left, left, parts=parts, least=least, most=most)
    # If one turn brings all of it, ask as ever: the blob may be larger than promised.
    return length if length < left else most


class Segments:
    """The plan for a blob of ``size`` bytes, of which the first ``done`` are there."""

    def __init__(self, size: int, *, least: int, done: int = 0) -> None:
        self.size = size
        self.bounds: tuple[int, int] | None = None
        self._least = least
        # Sorted, disjoint, and with something between any two: [start, stop).
        self._done: list[tuple[int, int]] = []
        self._taken: set[Segment] = set()
        self.reach(done)

    # -- what is where ---------------------------------------------------------------------

    @property
    def contiguous(self) -> int:
        """The bytes from the beginning that are done without a gap."""
        return self._done[0][1] if self._done and self._done[0][0] == 0 else 0

    @property
    def left(self) -> int:
        """Bytes in holes."""
        return sum(stop - start for start, stop in self.holes())

    def holes(self) -> Iterator[tuple[int, int]]:
        """What is neither done nor taken, in order."""
        coming = [(segment.at, _stop(segment)) for segment in self._taken]
        at = 0
        for start, stop in sorted([*self._done, *coming]):
            if start > at:
                yield at, start
            at = max(at, stop)
        if at < self.size:
            yield at, self.size

    def done_after(self, position: int) -> int:
        """The end of the done bytes that ``position`` lies in; ``position`` itself if in none."""
        place = bisect_right(self._done, (position, self.size + 1)) - 1
        return max(position, self._done[place][1]) if place >= 0 else position

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """What of this range is not done, whoever brings it, in order."""
        for first, last in self._done:
            if first > start:
                yield start, min(first, stop)
            start = max(start, last)
            if start >= stop:
                return
        yield start, stop

    def front(self, position: int) -> int:
        """How far that has come which will reach ``position``: the byte that comes next there.

        A segment that holds it will, and so will, in time, what follows the contiguous bytes.
        """
        coming = [s.at for s in self._taken if s.at <= position < _stop(s)]
        return max(coming, default=self.contiguous)

    # -- what turns do ---------------------------------------------------------------------

    def take(self, *, parts: int, most: int) -> Segment | None:
        """The next segment, for a turn of ``most`` bytes, one of ``parts`` at once; ``None``: all
        that is not done is taken."""
        hole = next(self.open_holes(), None)
        if hole is None:
            return None
        start, stop = hole
        left = stop - start
        if parts > 1:
            left = sum(b - a for a, b in self.open_holes())
            most = min(most, max(self._least, most // TURN_PARTS))
        length = cut(stop - start, left, parts=parts, least=self._least, most=most)
        segment = Segment(start, start + length)
        self._taken.add(segment)
        return segment

    def take_last(self, count: int) -> Segment | None:
        """The last ``count`` bytes of what is not done and not taken, within the bounds, or as many
        as the last hole has; ``None``: there is none."""
        hole = max(self.open_holes(), default=None)
        if hole is None:
            return None
        start, stop = hole
        segment = Segment(max(start, stop - count), stop)
        self._taken.add(segment)
        return segment

    def shorten(self, segments: Iterable[Segment], *, parts: int, long: int) -> bool:
        """Leave the one of these ``segments`` that has most to come one of about ``parts`` equal
        parts of that; the rest is a hole. False if none has ``long`` bytes to come, or there are
        bounds: a fleet passes on what comes in order, and what is on its way when a turn is cut
        comes twice (16 nodes: 1.07 times all bytes; the last was later by 0.2 times of one alone).
        """
        longest = max(segments, key=_to_come, default=None)
        if self.bounds is not None or longest is None or (left := _to_come(longest)) < long:
            return False
        kept = max(self._least, left // parts)
        if kept >= left:
            return False
        longest.stop = _stop(longest) - left + kept
        return True

    def stretch(self, segment: Segment, follower: Segment) -> None:
        """What was to be brought by its ``follower`` is the shortened ``segment``'s again."""
        self.give_back(follower)
        segment.stop = min(_stop(follower), segment.asked or 0)

    def bind(self, start: int, stop: int, turns: Iterable[Segment]) -> None:
        """Cut only what lies in these bounds from holes. Those ``turns`` end that bring something
        else."""
        self.bounds = (start, stop)
        for segment in turns:
            self.end_elsewhere(segment)

    def unbind(self) -> None:
        """All of it may be cut again."""
        self.bounds = None

    def is_elsewhere(self, segment: Segment) -> bool:
        """Is what it brings next out of bounds?"""
        start, stop = self.bounds or (0, self.size)
        return not start <= segment.at < stop

    def end_elsewhere(self, segment: Segment) -> None:
        """End it here if what it brings next is out of bounds. A turn that has not been answered,
        or hauls, cannot be ended when they are set: it is asked for again with what it brings."""
        if self.is_elsewhere(segment):
            segment.end_here()

    def open_holes(self) -> Iterator[tuple[int, int]]:
        """The holes within the bounds."""
        first, last = self.bounds or (0, self.size)
        for start, stop in self.holes():
            if max(start, first) < min(stop, last):
                yield max(start, first), min(stop, last)

    def claim(self, start: int, stop: int) -> Segment:
        """A segment for just this range. Raises ``ValueError`` if somebody brings some of it: two
        that write the same bytes would both take them for the next ones."""
        if not self.is_free(start, stop):
            raise ValueError(f"{self!r}: somebody brings some of {start}-{stop}")
        segment = Segment(start, stop)
        self._taken.add(segment)
        return segment

    def is_free(self, start: int, stop: int) -> bool:
        """Does nobody bring any of it?"""
        return all(segment.at >= stop or _stop(segment) <= start for segment in self._taken)

    def adopt(self, segment: Segment, stop: int) -> None:
        """A turn that began before there was a plan brings what is before ``stop``."""
        segment.stop = segment.asked = min(stop, self.size)
        self._taken.add(segment)

    def reach(self, position: int) -> None:
        """Whatever is before ``position`` is done."""
        self._enter(0, position)

    def wrote(self, segment: Segment, count: int) -> None:
        """The next ``count`` bytes of ``segment`` are written."""
        self._enter(segment.at, segment.at + count)
        segment.at += count

    def give_back(self, segment: Segment) -> None:
        """Its turn has ended. Does nothing if it was given back already."""
        self._taken.discard(segment)

    def _enter(self, start: int, stop: int) -> None:
        """Note as done; what touches or overlaps becomes one."""
        if start >= stop:
            return
        first = bisect_left(self._done, (start, start))
        if first and self._done[first - 1][1] >= start:
            first -= 1
        last = bisect_right(self._done, (stop, self.size + 1))
        if first < last:
            start = min(start, self._done[first][0])
            stop = max(stop, self._done[last - 1][1])
        self._done[first:last] = [(start, stop)]

    def __repr__(self) -> str:
        return (
            f"<Segments {self.contiguous}/{self.size}, {len(self._taken)} taken, {self.left} left>"
        )


def may_gather(segment: Segment, received: int, count: int) -> bool:
    """After a piece of ``count`` bytes: may more come together before the next one is taken? If it
    was small, nobody waits for what follows it, and the turn would not end later for that."""
    is_waited_for = segment.at <= received
    is_near_its_end = segment.stop is not None and segment.stop - segment.at <= GATHER_BYTES
    return count < GATHER_BYTES and not is_waited_for and not is_near_its_end


def _to_come(segment: Segment) -> int:
    """Bytes that are neither written nor about to be."""
    return _stop(segment) - max(segment.at, segment.in_hand)


def _stop(segment: Segment) -> int:
    if segment.stop is None:
        raise ValueError(f"{segment!r} has no end")
    return segment.stop
