"""Tasks, whoever leads: the leader's table, asked from here or over the leader's socket.

``RemoteBoard`` asks over one connection, and raises ``LeaderGone`` when that ends; ``answer`` is
the other end of it. ``TeamBoard`` is what the admin listener has: it asks whoever leads, and the
next one when the leader goes. An order carries the id of its task, so one that is given again is
the same task; a listener goes on with the next leader's table and hears how everything is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

from proxy.oci.errors import LeaderMissing
from proxy.pull.task import Document, Order, TaskState
from proxy.pull.task_news import News, Watch
from proxy.pull.tasks import Board
from proxy.team.frames import BadFrame, Frame
from proxy.team.wire import Fields, LeaderGone

V = TypeVar("V")

#: Seconds that a question waits for somebody who leads.
PATIENCE = 10.0


class Call(Protocol):
    """One call at the leader, as a follower has it."""

    def ask_more(self) -> None: ...

    async def reply(self) -> Frame: ...

    def close(self) -> None: ...


#: Opens a call of this kind for this client's request, if it is one's, with these fields. Raises
#: ``LeaderGone``.
Open = Callable[..., Call]


class RemoteBoard:
    """The board of the process that leads."""

    def __init__(self, open_call: Open) -> None:
        self._open = open_call

    async def add(self, id: str, order: Order) -> Document:
        return await self._ask("add", id=id, order=order.document())

    async def newest(self, state: TaskState | None, most: int) -> Document:
        return await self._ask("newest", state=None if state is None else state.value, most=most)

    async def get(self, id: str) -> Document:
        return await self._ask("get", id=id)

    async def wait(self, id: str, seconds: float) -> Document:
        return await self._ask("wait", id=id, seconds=seconds)

    async def cancel(self, id: str) -> Document:
        return await self._ask("cancel", id=id)

    async def watch(self, last: str | None, only: str | None) -> Watch:
        call = self._open("watch", None, last=last, only=only)
        try:
            _ = await call.reply()
        except BaseException:
            call.close()
            raise
        return _RemoteWatch(call)

    async def _ask(self, question: str, **fields: Any) -> Document:
        with contextlib.closing(self._open("task", None, question=question, **fields)) as call:
            return dict(json.loads((await call.reply()).data))


class _RemoteWatch:
    """A listener at the leader. The next word is asked for when the last one has been passed on, so
    whoever is slow here is slow there."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._has_asked = False

    async def next(self) -> News | None:
        if not self._has_asked:
            self._call.ask_more()
            self._has_asked = True
        frame = await self._call.reply()
        self._has_asked = False
        if frame.kind == "end":
            return None
        return News(frame.fields["id"], frame.fields["what"], dict(json.loads(frame.data)))

    def close(self) -> None:
        self._call.close()


async def answer(board: Board, told: Fields) -> Document:
    """What the leader's board says to a call of kind "task". Raises ``BadFrame``, ``PullError``."""
    try:
        id, question = str(told.get("id")), told["question"]
        if question == "add":
            return await board.add(id, Order.parse(told["order"]))
        if question == "newest":
            state = None if told["state"] is None else TaskState(told["state"])
            return await board.newest(state, int(told["most"]))
        if question == "get":
            return await board.get(id)
        if question == "wait":
            return await board.wait(id, float(told["seconds"]))
        if question == "cancel":
            return await board.cancel(id)
    except (KeyError, TypeError, ValueError) as error:
        raise BadFrame(f"a question about tasks that is none: {error!r}") from error
    raise BadFrame("a question about tasks that nobody asks")


async def listen(board: Board, told: Fields) -> Watch:
    """What a call of kind "watch" listens to. Raises ``BadFrame``, ``PullError``."""
    last, only = told.get("last"), told.get("only")
    if not isinstance(last, str | None) or not isinstance(only, str | None):
        raise BadFrame("a listener who says nothing that can be heard")
    return await board.watch(last, only)


class TeamBoard:
    """The board of whoever leads. ``board`` waits until somebody does."""

    def __init__(self, board: Callable[[], Awaitable[Board]], patience: float = PATIENCE) -> None:
        self._board = board
        self._patience = patience

    async def add(self, id: str, order: Order) -> Document:
        return await self._asked(lambda board: board.add(id, order))

    async def newest(self, state: TaskState | None, most: int) -> Document:
        return await self._asked(lambda board: board.newest(state, most))

    async def get(self, id: str) -> Document:
        return await self._asked(lambda board: board.get(id))

    async def wait(self, id: str, seconds: float) -> Document:
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        return await self._asked(lambda board: board.wait(id, max(0.0, until - loop.time())))

    async def cancel(self, id: str) -> Document:
        return await self._asked(lambda board: board.cancel(id))

    async def watch(self, last: str | None, only: str | None) -> Watch:
        first = await self._asked(lambda board: board.watch(last, only))
        return _TeamWatch(self, only, first)

    async def _asked(self, question: Callable[[Board], Awaitable[V]]) -> V:
        while True:
            try:
                async with asyncio.timeout(self._patience):
                    board = await self._board()
            except TimeoutError:
                raise LeaderMissing from None
            with contextlib.suppress(LeaderGone):
                return await question(board)

    async def again(self, only: str | None) -> Watch:
        """Listen to whoever leads now, from the beginning."""
        return await self._asked(lambda board: board.watch(None, only))

    def __repr__(self) -> str:
        return "<TeamBoard>"


class _TeamWatch:
    """A listener that outlives the leader to whom it listens."""

    def __init__(self, team: TeamBoard, only: str | None, watch: Watch) -> None:
        self._team = team
        self._only = only
        self._watch: Watch | None = watch

    async def next(self) -> News | None:
        while True:
            if self._watch is None:
                self._watch = await self._team.again(self._only)
            try:
                return await self._watch.next()
            except LeaderGone:
                self._watch.close()
                self._watch = None

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
