"""A follower's end: asks the leader, and sends what it answers (theory: ``__init__.py``).

``Remote`` is one connection to one leader; it has the methods of a ``Puller``. When the leader goes
every call raises ``LeaderGone``, and whoever called asks whoever leads then (``front.py``).

A call's frames wait in a queue of their own. It is short: an answer, and then never more than the
one piece that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from proxy.oci.digest import Digest
from proxy.oci.errors import LeaderMissing, PullError, SizeMismatch
from proxy.oci.manifest import Manifest
from proxy.oci.paths import Kind
from proxy.oci.ranges import ByteRange
from proxy.oci.reference import Reference, Tag
from proxy.pull.asks import Ask, BlobAnswer, CacheWord, ManifestAnswer
from proxy.pull.manifests import Checked
from proxy.pull.reader import FileSpan, Piece
from proxy.pull.tags import TagKey
from proxy.store.blobs import FileLease
from proxy.store.reading import Reading
from proxy.store.store import LinkKey
from proxy.store.work import finish
from proxy.team import wire
from proxy.team.channel import BEAT, Channel, ChannelClosed, is_own_user
from proxy.team.frames import MAX_DIGESTS, MAX_IMAGES, VERSION, BadFrame, Frame
from proxy.team.fresh import FreshTags
from proxy.team.wire import LeaderGone
from proxy.upstream.client import Page

#: Seconds until a leader has to have said its hello, or its status.
HELLO = 2.0

__all__ = ["LeaderGone", "NoLeader", "Remote", "Unlike"]


class NoLeader(Exception):
    """Nobody answers at the socket; why, in words."""


class Unlike(Exception):
    """The leader is of another version, or has other settings; which, in words."""


class Remote:
    """A connection to the leader."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        beat: float = BEAT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls: dict[int, _Call] = {}
        self._numbers = 0
        loop = asyncio.get_running_loop()
        self.tags = FreshTags(clock)
        self._reading: Reading | None = None
        self._hello: asyncio.Future[Frame] = loop.create_future()
        self._gone: asyncio.Future[str] = loop.create_future()
        self._channel = Channel(sock, on_frame=self._take, on_closed=self._closed, beat=beat)

    @classmethod
    async def connect(
        cls,
        path: Path,
        settings: str,
        *,
        beat: float = BEAT,
        clock: Callable[[], float] = time.monotonic,
    ) -> Remote:
        """Follow the leader that listens at ``path``; ``clock`` is monotonic. Raises ``NoLeader``,
        ``Unlike``."""
        connecting = asyncio.get_running_loop().run_in_executor(None, _connected, path)
        try:
            sock = await finish(connecting, socket.socket.close)
        except OSError as error:
            raise NoLeader(f"nobody answers at {path}: {error!r}") from error
        remote = cls(sock, beat=beat, clock=clock)
        try:
            await remote._greet(settings)
        except BaseException:
            remote.close()
            raise
        return remote

    async def _greet(self, settings: str) -> None:
        try:
            async with asyncio.timeout(HELLO):
                await _first(self._hello, self._gone)
        except TimeoutError:
            raise NoLeader("the leader does not say hello; is it stopped?") from None
        if not self._hello.done():
            raise NoLeader(f"the leader hung up: {self._gone.result()}")
        fields = self._hello.result().fields
        if fields.get("version") != VERSION:
            version = fields.get("version")
            raise Unlike(f"it speaks version {version} of the protocol, this process {VERSION}")
        if fields.get("settings") != settings:
            raise Unlike("its upstreams are configured otherwise")

    def tell(self, reading: Reading) -> None:
        """Tell it of everything that the leader takes back, and when there is no leader."""
        self._reading = reading
        if self.is_lost:
            reading.lose()

    @property
    def wants_pulls(self) -> bool:
        """Does the leader fetch ahead, so that it has to hear of pulled manifests?"""
        return self._hello.result().fields.get("wants_pulls") is True

    @property
    def is_lost(self) -> bool:
        """Has the leader gone?"""
        return self._channel.is_closed

    async def lost(self) -> str:
        """Wait until the leader has gone; returns how."""
        return await asyncio.shield(self._gone)

    def close(self) -> None:
        """Leave the leader: it gives up every call."""
        self._channel.close("the follower ends")

    # -- what a Puller does ----------------------------------------------------------------

    async def manifest(self, ask: Ask, reference: Reference, *, head: bool) -> ManifestAnswer:
        """GET or HEAD of a manifest. Raises ``PullError``, ``LeaderGone``."""
        frame = await self._once(ask, "manifest", reference=str(reference), head=head)
        fields = frame.fields
        try:
            digest, media_type = Digest.parse(fields["digest"]), str(fields["type"])
            manifest = Manifest(media_type, frame.data, digest) if fields["whole"] else None
            word = CacheWord(fields["cache"])
            return ManifestAnswer(
                digest, media_type, int(fields["size"]), word, manifest, fields["warning"]
            )
        except (PullError, KeyError, ValueError, TypeError) as error:
            raise self._nonsense(error) from error

    async def refresh(self, ask: Ask, tag: Tag) -> Checked:
        """Ask the upstream what the tag is now. Raises ``PullError``, ``LeaderGone``."""
        fields = (await self._once(ask, "refresh", reference=str(tag))).fields
        was = fields.get("was")
        return Checked(Digest.parse(fields["digest"]), None if was is None else Digest.parse(was))

    async def listing(
        self, ask: Ask, kind: Kind, tail: str, query: Sequence[tuple[str, str]]
    ) -> Page:
        """A page of tags or referrers. Raises ``PullError``, ``LeaderGone``."""
        pairs = [list(pair) for pair in query]
        frame = await self._once(ask, "listing", what=kind.value, tail=tail, query=pairs)
        fields = frame.fields
        return Page(frame.data, str(fields["type"]), fields["link"], fields["filters"])

    async def blob(
        self, ask: Ask, digest: Digest, wanted: ByteRange | None, *, head: bool
    ) -> BlobAnswer:
        """GET or HEAD of a blob. The answer must be closed; its pieces raise ``LeaderGone`` when
        the leader goes. Raises ``PullError``, ``LeaderGone``."""
        span = wire.range_fields(wanted)
        call = self.open("blob", ask, digest=str(digest), range=span, head=head)
        try:
            frame = await call.reply()
            told = wire.read_blob(frame.fields)
            _note(ask, frame)
        except BadFrame as error:
            call.close()
            raise self._nonsense(error) from error
        except BaseException:
            call.close()
            raise
        pieces = call.pieces() if told.has_pieces else None
        return BlobAnswer(
            digest, told.size, told.span, told.cache, pieces, call.close, told.warning
        )

    async def status(self) -> dict[str, Any]:
        """What the leader's status says. Raises ``LeaderMissing``."""
        try:
            async with asyncio.timeout(HELLO):
                with contextlib.closing(self.open("status", None)) as call:
                    return dict(json.loads((await call.reply()).data))
        except (LeaderGone, TimeoutError):
            raise LeaderMissing from None

    def touch(self, digests: Iterable[Digest]) -> None:
        """Tell of uses."""
        names = [str(digest) for digest in digests]
        with contextlib.suppress(ChannelClosed):
            for start in range(0, len(names), MAX_DIGESTS):
                self._channel.send("touch", digests=names[start : start + MAX_DIGESTS])

    def pulled(self, images: Iterable[LinkKey]) -> None:
        """Tell of manifests that were answered here. Nobody waits for what comes of it."""
        keys = wire.image_keys(images)
        with contextlib.suppress(ChannelClosed):
            for start in range(0, len(keys), MAX_IMAGES):
                self._numbers += 1
                self._channel.send("pulled", self._numbers, images=keys[start : start + MAX_IMAGES])

    # -- calls -----------------------------------------------------------------------------

    async def _once(self, ask: Ask, kind: str, **fields: Any) -> Frame:
        """A call that has one answer."""
        call = self.open(kind, ask, **fields)
        try:
            frame = await call.reply()
        finally:
            call.close()
        _note(ask, frame)
        return frame

    def open(self, kind: str, ask: Ask | None, **fields: Any) -> _Call:
        """A call of this kind, which must be closed. Raises ``LeaderGone``."""
        if ask is not None:
            fields |= wire.ask_fields(ask, asyncio.get_running_loop().time())
        self._numbers += 1
        call = _Call(self._numbers, self._channel, ask, self._forget)
        if ask is not None and kind == "manifest":
            call.tag = (ask.upstream, ask.repository, fields["reference"])
        # First, because sending may be what finds the leader dead: then all calls are told.
        self._calls[self._numbers] = call
        try:
            self._channel.send(kind, self._numbers, **fields)
        except ChannelClosed:
            call.close()
            raise LeaderGone from None
        except BaseException:
            call.close()
            raise
        return call

    def _forget(self, number: int) -> None:
        self._calls.pop(number, None)

    def _nonsense(self, error: Exception) -> LeaderGone:
        """The leader says what no leader says: leave it."""
        self._channel.close(f"the leader said what no leader says: {error}")
        return LeaderGone(str(error))

    def _take(self, frame: Frame, fd: int | None) -> None:
        call = self._calls.get(frame.call)
        try:
            self._note(frame, call)
        except (BadFrame, PullError, KeyError, ValueError, TypeError) as error:
            _ = self._nonsense(error)
        if call is not None:
            call.take(frame, fd)
        elif fd is not None:
            os.close(fd)  # for a call whose client has left

    def _note(self, frame: Frame, call: _Call | None) -> None:
        """What counts from the moment it arrives: what is said of a tag, say, may be taken back by
        the very next frame."""
        fields = frame.fields
        if frame.kind == "hello" and not self._hello.done():
            self._hello.set_result(frame)
        elif frame.kind == "doubt":
            upstream, repository, tag = fields["tag"]
            self.tags.doubt((upstream, repository, tag))
        elif frame.kind == "gone" and self._reading is not None:
            self._reading.forget([Digest.parse(digest) for digest in fields["digests"]])
        elif frame.kind == "unlinked" and self._reading is not None:
            upstream, repository, digest = fields["link"]
            self._reading.unlink((upstream, repository, Digest.parse(digest)))
        elif call is not None and call.tag is not None and "fresh" in fields:
            self.tags.believe(call.tag, Digest.parse(fields["digest"]), float(fields["fresh"]))

    def _closed(self, reason: str) -> None:
        self.tags.clear()
        if self._reading is not None:
            self._reading.lose()
        if not self._gone.done():
            self._gone.set_result(reason)
        for call in tuple(self._calls.values()):
            call.lose()

    def __repr__(self) -> str:
        return f"<Remote with {len(self._calls)} calls, {self._channel!r}>"


class _Call:
    """One request that the leader answers; ``close`` ends it, on both sides."""

    def __init__(
        self, number: int, channel: Channel, ask: Ask | None, forget: Callable[[int], None]
    ) -> None:
        self._number = number
        self._channel = channel
        self._ask = ask
        self._forget = forget
        self._frames: deque[tuple[Frame, int | None]] = deque()
        self._news = asyncio.Event()
        self.tag: TagKey | None = None  # the tag that is asked for, or a digest in its place
        self._lease: FileLease | None = None
        self._is_lost = False
        self._is_over = False  # the leader has said its last word

    def take(self, frame: Frame, fd: int | None) -> None:
        is_answer = frame.kind == "answer" and frame.fields.get("pieces") is not True
        self._is_over = is_answer or frame.kind in ("error", "end")
        self._frames.append((frame, fd))
        self._news.set()

    def lose(self) -> None:
        self._is_lost = True
        self._news.set()

    async def reply(self) -> Frame:
        """The next frame. Raises its ``PullError`` if it is one, ``LeaderGone``."""
        while not self._frames:
            if self._is_lost:
                raise LeaderGone
            self._news.clear()
            await self._news.wait()
        frame, fd = self._frames.popleft()
        if fd is not None:
            self._use(fd)
        if frame.kind == "error":
            if self._ask is not None:
                _note(self._ask, frame)
            raise self._error(frame)
        return frame

    def _error(self, frame: Frame) -> Exception:
        try:
            return wire.read_error(frame.fields)
        except BadFrame as error:
            return self._nonsense(error)

    def _nonsense(self, error: Exception) -> LeaderGone:
        self._channel.close(f"the leader said what no leader says: {error}")
        return LeaderGone(str(error))

    def _use(self, fd: int) -> None:
        """Pieces lie in this file from here on; the last one's has been sent."""
        old, self._lease = self._lease, None
        if old is not None:
            old.close()
        file = os.fdopen(fd, "rb", buffering=0)
        # Its size is what the pieces say, and no eviction is held up: the file outlives its name.
        self._lease = FileLease(file, 0, lambda: None)

    def ask_more(self) -> None:
        """The next one may come. Raises ``LeaderGone``."""
        try:
            self._channel.send("more", self._number)
        except ChannelClosed:
            raise LeaderGone from None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The body, piece by piece; asking for the next one means that the last one was sent."""
        while True:
            self.ask_more()
            try:
                piece = self._piece(await self.reply())
            except BadFrame as error:
                raise self._nonsense(error) from error
            if piece is None:
                return
            yield piece

    def _piece(self, frame: Frame) -> Piece | None:
        if frame.kind == "bytes":
            return frame.data
        if frame.kind == "end":
            return None
        start, stop = frame.fields.get("start"), frame.fields.get("stop")
        if frame.kind != "span" or self._lease is None:
            raise BadFrame("no piece")
        if not isinstance(start, int) or not isinstance(stop, int) or not 0 <= start < stop:
            raise BadFrame("no span")
        return FileSpan(self._lease, start, stop)

    def close(self) -> None:
        """The client has all it wanted, or has left. Idempotent."""
        self._forget(self._number)
        if not self._channel.is_closed and not self._is_over:
            self._is_over = True
            self._channel.send("stop", self._number)
        while self._frames:
            _, fd = self._frames.popleft()
            if fd is not None:
                os.close(fd)
        if self._lease is not None:
            self._lease.close()
            self._lease = None


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _note(ask: Ask, frame: Frame) -> None:
    """What the time was spent on, as the leader saw it."""
    fields = frame.fields
    queue, waited = fields.get("queue", 0.0), fields.get("waited", 0.0)
    if isinstance(queue, int | float) and isinstance(waited, int | float):
        ask.timing.queue, ask.timing.upstream = float(queue), float(waited)


def skipped(piece: Piece, count: int) -> tuple[Piece | None, int]:
    """``piece`` without its first ``count`` bytes, and how many are still to be left out."""
    length = piece.length if isinstance(piece, FileSpan) else len(piece)
    if count >= length:
        return None, count - length
    if isinstance(piece, FileSpan):
        return FileSpan(piece.lease, piece.start + count, piece.stop), 0
    return piece[count:], 0


def same_blob(first: BlobAnswer, again: BlobAnswer) -> None:
    """A body goes on only as the same blob. Raises ``SizeMismatch``."""
    if first.size is not None and again.size is not None and first.size != again.size:
        raise SizeMismatch(first.size, again.size)


def _connected(path: Path) -> socket.socket:
    """Connected to what listens at ``path``. In a thread. Raises ``OSError``."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(HELLO)
        sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        if not is_own_user(sock):
            raise PermissionError("it belongs to another user")
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
