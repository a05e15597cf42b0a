"""What the listener asks, whoever leads: the leader's ``Puller``, here or in another process.

``Front`` answers by the ``Puller`` of this process while it leads. While it follows, hits are
answered here and the rest is asked of the leader; while nobody leads, hits still are, and the rest
waits. A request that had no answer when the leader went is asked again of the next one; a body that
had begun goes on at its byte. What is asked again is what the client would have asked.

Deadlines are the leader's. Those here are a little later, and only met when nobody answers at all:
the leader is stopped, or hangs, and its lock keeps everybody else from leading.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from proxy.oci.digest import Digest
from proxy.oci.errors import LeaderMissing
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference, Tag
from proxy.pull.asks import Ask, BlobAnswer, ManifestAnswer
from proxy.pull.at_hand import Finder, Hit
from proxy.pull.deadlines import Deadlines
from proxy.pull.manifests import Checked
from proxy.pull.reader import FileSpan, Piece
from proxy.pull.serve import Answerer
from proxy.pull.tasks import Board
from proxy.team.follower import Remote, same_blob, skipped
from proxy.team.hits import Hits
from proxy.team.tasks import RemoteBoard
from proxy.team.wire import LeaderGone
from proxy.upstream.client import Page

V = TypeVar("V")

#: Seconds that the leader's own deadlines get before those of a follower.
MARGIN = 0.5
#: Seconds that a body which has begun waits for the next leader.
RECOVERY = 30.0


class Front:
    """Answers requests by whoever leads at the moment."""

    def __init__(self, deadlines: Deadlines, *, recovery: float = RECOVERY) -> None:
        self._deadlines = deadlines
        self._recovery = recovery
        self._own: Answerer | None = None  # while this process leads
        self._own_board: Board | None = None
        self._remote: Remote | None = None  # while it follows
        self._hits: Hits | None = None
        self.found_by: Finder | None = None  # what is at hand
        self._changed = asyncio.Event()
        self.at_hand: Finder = _AtHand(self)

    # -- whom to ask -----------------------------------------------------------------------

    def lead(self, own: Answerer, at_hand: Finder, board: Board) -> None:
        """This process leads; ``at_hand`` finds what ``own`` would answer out of memory."""
        self._own, self._remote, self._hits = own, None, None
        self._own_board = board
        self.found_by = at_hand
        self._changed.set()

    def follow(self, remote: Remote, hits: Hits) -> None:
        """Another process leads."""
        self._remote, self._hits, self.found_by = remote, hits, hits.at_hand
        self._changed.set()

    def lose(self) -> None:
        """The leader has gone. Hits go on."""
        self._remote = None

    @property
    def leads(self) -> bool:
        """Does this process lead?"""
        return self._own is not None

    async def leader(self) -> Answerer:
        """Whoever leads; waits until somebody does."""
        while True:
            if self._own is not None:
                return self._own
            if self._remote is not None and not self._remote.is_lost:
                return self._remote
            self._changed.clear()
            await self._changed.wait()

    async def board(self) -> Board:
        """The tasks of whoever leads; waits until somebody does."""
        while True:
            _ = await self.leader()
            if self._own_board is not None:
                return self._own_board
            if self._remote is not None:
                return RemoteBoard(self._remote.open)

    # -- requests --------------------------------------------------------------------------

    async def manifest(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """GET or HEAD of a manifest. Raises PullError."""
        if self._own is not None:
            return await self._own.manifest(ask, reference, head=head)
        if self._hits is not None:
            hit = await self._hits.manifest(ask, reference, head=head)
            if hit is not None:
                return hit
        until = self._deadlines.short(ask.upstream)
        return await self._asked(ask, until, lambda one: one.manifest(ask, reference, head=head))

    async def refresh(self, ask: Ask, tag: Tag) -> Checked:
        """Ask the upstream what the tag is now. Raises PullError."""
        until = self._deadlines.short(ask.upstream)
        return await self._asked(ask, until, lambda one: one.refresh(ask, tag))

    async def listing(
        self, ask: Ask, kind: Kind, tail: str, query: Sequence[tuple[str, str]]
    ) -> Page:
        """A page of tags or referrers. Raises PullError."""
        until = self._deadlines.short(ask.upstream)
        return await self._asked(ask, until, lambda one: one.listing(ask, kind, tail, query))

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer:
        """GET or HEAD of a blob. The answer must be closed. Raises PullError."""
        if self._own is not None:
            return await self._own.blob(ask, digest, wanted, head=head)
        if self._hits is not None:
            hit = await self._hits.blob(ask, digest, wanted, head=head)
            if hit is not None:
                return hit
        until = self._deadlines.short if head else self._deadlines.headers
        answer = await self._asked(
            ask, until(ask.upstream), lambda one: one.blob(ask, digest, wanted, head=head)
        )
        if answer.pieces is None:
            return answer
        body = _Body(self, ask, answer, self._recovery)
        return replace(answer, pieces=body.pieces(), close=body.close)

    async def _asked(
        self, ask: Ask, seconds: float, question: Callable[[Answerer], Awaitable[V]]
    ) -> V:
        """The leader's answer, or the next one's when it goes. Raises ``LeaderMissing``."""
        try:
            async with asyncio.timeout_at(ask.arrived + seconds + MARGIN):
                while True:
                    leader = await self.leader()
                    with contextlib.suppress(LeaderGone):
                        return await question(leader)
        except TimeoutError:
            raise LeaderMissing from None

    def __repr__(self) -> str:
        return f"<Front of {self._own or self._remote or 'nobody'}>"


class _AtHand:
    """What is at hand, whoever leads. What was found by a role is withdrawn with it."""

    def __init__(self, front: Front) -> None:
        self._front = front

    def manifest(
        self, upstream: str, repository: str, reference: Reference, *, head: bool
    ) -> Hit | None:
        finder = self._front.found_by
        if finder is None:
            return None
        return finder.manifest(upstream, repository, reference, head=head)

    def blob(self, upstream: str, repository: str, digest: Digest, *, head: bool) -> Hit | None:
        finder = self._front.found_by
        return None if finder is None else finder.blob(upstream, repository, digest, head=head)


class _Body:
    """The body of one answer, which outlives the leader that began it."""

    def __init__(self, front: Front, ask: Ask, answer: BlobAnswer, recovery: float) -> None:
        self._front = front
        self._ask = ask
        self._first = self._answer = answer
        self._recovery = recovery
        span = answer.span
        self._position, self._stop = (span.start, span.stop) if span else (0, answer.size)

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """All pieces; a new leader's begin where the last one's ended. Raises ``PullError``."""
        skip = 0
        while self._answer.pieces is not None:
            try:
                async with contextlib.aclosing(self._answer.pieces) as pieces:
                    async for whole in pieces:
                        piece, skip = skipped(whole, skip)
                        if piece is not None:
                            yield piece
                            length = piece.length if isinstance(piece, FileSpan) else len(piece)
                            self._position += length
                return
            except LeaderGone:
                self._answer.close()
            if self._stop is not None and self._position >= self._stop:
                return  # the last bytes came only after the verdict
            self._answer = await self._again()
            same_blob(self._first, self._answer)
            skip = self._position - (self._answer.span.start if self._answer.span else 0)

    async def _again(self) -> BlobAnswer:
        """The rest, from whoever leads now.

        A whole blob is asked for as one, though its beginning is left out here: only a reader that
        begins at byte 0 never gets past what is verified (D10), however far its client is.
        """
        wanted = None
        if self._first.span is not None:
            wanted = ByteRange(self._position, None if self._stop is None else self._stop - 1)
        while True:
            try:
                async with asyncio.timeout(self._recovery):
                    leader = await self._front.leader()
            except TimeoutError:
                raise LeaderMissing from None
            now = asyncio.get_running_loop().time()
            # It has its place already: no deadline makes its client come back for another.
            ask = Ask(self._ask.route, self._ask.client, now, is_patient=True)
            with contextlib.suppress(LeaderGone):
                return await leader.blob(ask, self._first.digest, wanted, head=False)

    def close(self) -> None:
        """Leave the flight. Idempotent. No piece may be used after this."""
        self._answer.close()

    def __repr__(self) -> str:
        return f"<Body of {self._first.digest} at {self._position}>"
