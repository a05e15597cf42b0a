"""The leader's end: its followers, and the calls that they have open (theory: ``__init__.py``).

A call is a task. It is cancelled by "stop" and by the end of its follower's channel, as a handler
is when its client leaves, and gives back in ``finally`` what it holds: readers, leases, places in
the queue. What a follower does wrong ends its channel, and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from proxy.observe.logs import Logger
from proxy.oci.digest import Digest
from proxy.oci.errors import InternalError, PullError, ShuttingDown
from proxy.oci.reference import Tag, parse_reference
from proxy.pull.asks import Ask, BlobAnswer, Timing
from proxy.pull.reader import FileSpan, Piece
from proxy.pull.serve import Puller
from proxy.pull.tags import TagKey
from proxy.pull.task_news import News, Watch
from proxy.pull.tasks import Board
from proxy.store.blobs import FileLease
from proxy.store.store import LinkKey
from proxy.store.work import finish
from proxy.team import wire
from proxy.team.channel import BEAT, Channel, ChannelClosed, is_own_user
from proxy.team.frames import MAX_DIGESTS, VERSION, BadFrame, Frame
from proxy.team.tasks import answer, listen
from proxy.upstream.routing import Upstream

#: Followers at a time, at most: workers of one machine.
MAX_FOLLOWERS = 256
#: Calls of one follower at a time, at most: it has no more descriptors for clients.
MAX_CALLS = 1 << 20
#: Seconds until a listener that has no descriptor left tries again.
_ACCEPT_PAUSE = 0.1

Touch = Callable[[Digest], None]
Status = Callable[[], Mapping[str, Any]]


class Leader:
    """Listens beside LOCK, from ``start`` to ``close``."""

    def __init__(
        self,
        puller: Puller,
        *,
        upstreams: Iterable[Upstream],
        settings: str,
        touch: Touch,
        status: Status,
        hand_over: Callable[[], None],
        tasks: Board,
        log: Logger,
        beat: float = BEAT,
    ) -> None:
        """``settings`` is what followers must have in common with this process, as a hash.
        ``hand_over`` is called before followers are let go, who go on with the fills."""
        self.puller = puller
        self.upstreams = {upstream.name: upstream for upstream in upstreams}
        self.settings = settings
        self.touch = touch
        self.status = status
        self.tasks = tasks
        self.log = log
        self._hand_over = hand_over
        self._beat = beat
        self._guests: set[Guest] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """How many follow."""
        return len(self._guests)

    async def start(self, path: Path) -> None:
        """Listen at ``path``. Only who holds LOCK may: whatever is there is a dead leader's.

        Raises ``OSError``.
        """
        listening = asyncio.get_running_loop().run_in_executor(None, _listen, path)
        self._listener = await finish(listening, socket.socket.close)
        self._accepting = asyncio.create_task(self._accept(self._listener), name="followers")

    async def close(self) -> None:
        """Let all followers go, and wait until their calls have given back what they held."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.wait([self._accepting])
        if self._listener is not None:
            self._listener.close()
        guests = tuple(self._guests)
        if guests:
            self._hand_over()
        for guest in guests:
            guest.channel.close("the leader ends")
        for guest in guests:
            await guest.ended()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:  # no descriptor is left, say
                self.log.warning("follower_not_accepted", error=str(error))
                await asyncio.sleep(_ACCEPT_PAUSE)
                continue
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if len(self._guests) >= MAX_FOLLOWERS or not is_own_user(sock):
            self.log.warning("follower_refused", followers=len(self._guests))
            sock.close()
            return
        guest = Guest(self, sock, self._beat)
        self._guests.add(guest)
        guest.channel.send(
            "hello",
            version=VERSION,
            settings=self.settings,
            pid=os.getpid(),
            wants_pulls=self.puller.wants_pulls,
        )

    def doubt(self, key: TagKey) -> None:
        """No follower may believe any more what it was told of a tag."""
        self._tell("doubt", tag=list(key))

    def gone(self, digests: Sequence[Digest]) -> None:
        """No follower may answer any more with these by what it has seen of them."""
        for start in range(0, len(digests), MAX_DIGESTS):
            names = [str(digest) for digest in digests[start : start + MAX_DIGESTS]]
            self._tell("gone", digests=names)

    def unlinked(self, key: LinkKey) -> None:
        """Nor through a repository that was seen to have it."""
        upstream, repository, digest = key
        self._tell("unlinked", link=[upstream, repository, str(digest)])

    def _tell(self, kind: str, **fields: Any) -> None:
        for guest in tuple(self._guests):
            with contextlib.suppress(ChannelClosed):
                guest.channel.send(kind, **fields)

    def forget(self, guest: Guest) -> None:
        """``guest`` has gone, and so have its calls."""
        self._guests.discard(guest)

    def __repr__(self) -> str:
        return f"<Leader of {len(self)} followers>"


class Guest:
    """One follower, as the leader sees it."""

    def __init__(self, leader: Leader, sock: socket.socket, beat: float) -> None:
        self._leader = leader
        self._calls: dict[int, _Call] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.channel = Channel(sock, on_frame=self._take, on_closed=self._closed, beat=beat)

    async def ended(self) -> None:
        """Wait until its calls have ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _closed(self, reason: str) -> None:
        for task in self._tasks:
            task.cancel()
        if not self._tasks:
            self._leader.forget(self)
        self._leader.log.info("follower_gone", reason=reason, calls=len(self._tasks))

    def _take(self, frame: Frame, fd: int | None) -> None:
        """Do what a frame says; what no follower would say ends the channel."""
        if fd is not None:
            os.close(fd)  # no follower sends one
        try:
            if frame.call:
                self._take_for_call(frame)
            elif frame.kind == "touch":
                for digest in frame.fields["digests"]:
                    self._leader.touch(Digest.parse(digest))
            else:
                raise BadFrame(f"no frame is called {frame.kind[:20]!r}")
        except (BadFrame, PullError, KeyError, TypeError, AttributeError) as error:
            self.channel.close(f"it said what no follower says: {error}")

    def _take_for_call(self, frame: Frame) -> None:
        call = self._calls.get(frame.call)
        if frame.kind == "more":
            if call is not None:
                call.wants.set()
        elif frame.kind == "stop":
            if call is not None:
                call.stop()
        elif call is not None or len(self._calls) >= MAX_CALLS:
            raise BadFrame("a call that is open already, or too many")
        else:
            self._open(frame)

    def _open(self, frame: Frame) -> None:
        call = _Call(self._leader, self.channel, frame)
        task = asyncio.create_task(call.run(), name=f"call {frame.kind}")
        call.task = task
        self._calls[frame.call] = call
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._over(frame.call, done))

    def _over(self, number: int, task: asyncio.Task[None]) -> None:
        del self._calls[number]
        self._tasks.discard(task)
        if self.channel.is_closed and not self._tasks:
            self._leader.forget(self)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._leader.log.error("call_defect", exc_info=error)
            self.channel.close("a call failed here")

    def __repr__(self) -> str:
        return f"<Guest with {len(self._calls)} calls, {self.channel!r}>"


class _Call:
    """One request of one client of a follower."""

    def __init__(self, leader: Leader, channel: Channel, frame: Frame) -> None:
        self.wants = asyncio.Event()  # the follower can take a piece
        self.task: asyncio.Task[None] | None = None
        self._leader = leader
        self._channel = channel
        self._frame = frame
        self._lease: FileLease | None = None  # the one whose descriptor the follower has

    def stop(self) -> None:
        """The client has left."""
        if self.task is not None:
            self.task.cancel()

    async def run(self) -> None:
        """Answer, whatever it takes."""
        handlers = {
            "manifest": self._manifest,
            "refresh": self._refresh,
            "blob": self._blob,
            "listing": self._listing,
        }
        try:
            if self._frame.kind == "status":
                self._send("answer", data=json.dumps(self._leader.status()).encode())
                return
            if self._frame.kind == "pulled":
                await self._pulled()
                return
            if self._frame.kind in ("task", "watch"):
                about = self._task if self._frame.kind == "task" else self._watch
                await self._answer(about, Timing())
                return
            handler = handlers.get(self._frame.kind)
            if handler is None:
                raise BadFrame(f"no call is named {self._frame.kind[:20]!r}")
            now = asyncio.get_running_loop().time()
            ask = wire.read_ask(self._frame.fields, self._leader.upstreams, now)
            await self._answer(partial(handler, ask), ask.timing)
        except ChannelClosed:
            return
        except BadFrame as error:
            self._channel.close(f"it said what no follower says: {error}")

    async def _answer(self, handler: Callable[[], Awaitable[None]], timing: Timing) -> None:
        try:
            await handler()
        except ShuttingDown:
            # The client need not know that the leader ends: the next one will answer.
            self._channel.close("the leader ends")
        except PullError as error:
            self._send("error", **wire.error_fields(error), **wire.timing_fields(timing))
        except (BadFrame, ChannelClosed):
            raise
        except Exception as error:  # a defect of ours: its client hears of it, and the log
            self._leader.log.error("call_defect", exc_info=error)
            self._send("error", **wire.error_fields(InternalError()))

    def _send(self, kind: str, *, data: bytes = b"", fd: int | None = None, **fields: Any) -> None:
        self._channel.send(kind, self._frame.call, data=data, fd=fd, **fields)

    async def _manifest(self, ask: Ask) -> None:
        fields = self._frame.fields
        reference = parse_reference(str(fields.get("reference")))
        head = fields.get("head") is True
        answer = await self._leader.puller.manifest(ask, reference, head=head)
        raw = b"" if answer.manifest is None else answer.manifest.raw
        told = {**wire.manifest_fields(answer), **wire.timing_fields(ask.timing)}
        if isinstance(reference, Tag) and answer.warning is None:
            told["fresh"] = self._leader.puller.fresh_for(ask, reference, answer.digest)
        self._send("answer", data=raw, **told)

    async def _pulled(self) -> None:
        """The follower has answered these manifests; it waits for no answer."""
        for image in wire.read_images(self._frame.fields, self._leader.upstreams):
            try:
                await self._leader.puller.pulled(*image)
            except PullError as error:  # a guess: whoever asks for its blobs hears of it
                self._leader.log.debug("not_prefetched", digest=str(image[2]), cause=str(error))

    async def _task(self) -> None:
        """A question about tasks."""
        said = await answer(self._leader.tasks, self._frame.fields)
        self._send("answer", data=json.dumps(said).encode())

    async def _watch(self) -> None:
        """A listener to tasks: a word for each time that more is asked for."""
        watch = await listen(self._leader.tasks, self._frame.fields)
        with contextlib.closing(watch):
            self._send("answer", pieces=True)
            while (news := await self._next_word(watch)) is not None:
                said = json.dumps(news.document).encode()
                self._send("news", data=said, id=news.id, what=news.kind)
            self._send("end")

    async def _next_word(self, watch: Watch) -> News | None:
        await self.wants.wait()
        self.wants.clear()
        try:
            return await watch.next()
        except ShuttingDown:
            # The next leader goes on with it. That is when the channel ends, not yet: pulls go on.
            never: asyncio.Future[News] = asyncio.get_running_loop().create_future()
            return await never

    async def _refresh(self, ask: Ask) -> None:
        tag = Tag.parse(str(self._frame.fields.get("reference")))
        found = await self._leader.puller.refresh(ask, tag)
        was = None if found.was is None else str(found.was)
        self._send("answer", digest=str(found.digest), was=was)

    async def _listing(self, ask: Ask) -> None:
        fields = self._frame.fields
        kind, tail = wire.read_tail(fields)
        page = await self._leader.puller.listing(ask, kind, tail, wire.read_query(fields))
        timing = wire.timing_fields(ask.timing)
        self._send("answer", data=page.body, **wire.page_fields(page), **timing)

    async def _blob(self, ask: Ask) -> None:
        fields = self._frame.fields
        digest, wanted = wire.read_digest(fields), wire.read_range(fields.get("range"))
        head = fields.get("head") is True
        answer = await self._leader.puller.blob(ask, digest, wanted, head=head)
        try:
            has_pieces = answer.pieces is not None
            head_of = wire.BlobHead(
                answer.size, answer.span, answer.cache, answer.warning, has_pieces
            )
            timing = wire.timing_fields(ask.timing)
            self._send("answer", **wire.blob_fields(head_of), **timing)
            if answer.pieces is not None:
                await self._give(answer.pieces)
        finally:
            await _end(answer)

    async def _give(self, pieces: AsyncGenerator[Piece, None]) -> None:
        """A piece for each time that more is asked for; asking means that the last one is sent."""
        while True:
            await self.wants.wait()
            self.wants.clear()
            piece = await anext(pieces, None)
            if piece is None:
                self._send("end")
                return
            if isinstance(piece, FileSpan):
                self._give_span(piece)
            else:
                self._send("bytes", data=piece)

    def _give_span(self, span: FileSpan) -> None:
        is_new = span.lease is not self._lease
        self._lease = span.lease
        fd = span.lease.fileno() if is_new else None
        self._send("span", fd=fd, start=span.start, stop=span.stop)


async def _end(answer: BlobAnswer) -> None:
    if answer.pieces is not None:
        await answer.pieces.aclose()
    answer.close()


def _listen(path: Path) -> socket.socket:
    """A listening socket at ``path``, for our user only. In a thread: it looks at the disk."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    # A socket's path may have 107 bytes, a cache directory's many more.
    near = f"/proc/self/fd/{directory}/{path.name}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(near)
        sock.bind(near)
        os.chmod(near, 0o600)  # before anybody can connect: it does not listen yet
        sock.listen(MAX_FOLLOWERS)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(directory)
    return sock
