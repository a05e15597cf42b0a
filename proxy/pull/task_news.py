"""Who listens to what becomes of tasks, and what each has not been told yet.

News are about states, not about changes: each says all there is to say of one task, and whoever
missed some is right again with the next. So a listener's queue holds tasks, each once, and what is
said of one is made when it is its turn. The queue is bounded: a listener that takes nothing while
``MAX_BEHIND`` other tasks change is let go, with a last word that says so.

A word has an id, the table's epoch and version, if with it everything has been said. Who comes back
with the last id he heard is told of every task that has changed since; in another epoch (another
process leads now), and without an id, of all there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from proxy.oci.errors import Overloaded, ShuttingDown
from proxy.pull.task import Document

#: Listeners at a time, at most.
MAX_LISTENERS = 64
#: Tasks that a listener may not have been told of, at most, beside those it was to hear at first.
MAX_BEHIND = 256


@dataclass(frozen=True, slots=True)
class News:
    """One word: of a ``task``, or that this is the ``end``. ``id`` is empty while there is more to
    say."""

    id: str
    kind: str
    document: Document


class Watch(Protocol):
    """What a listener holds; it must be closed."""

    async def next(self) -> News | None:
        """The next word; None after the last. May be cancelled, and loses nothing by it. Raises
        ``ShuttingDown`` when this table ends, and not what is told of."""
        ...

    def close(self) -> None: ...


class Listener:
    """One listener. ``tell`` says how a task is, None if it is forgotten; ``mark`` is the id of
    what has been said when nothing is left to say."""

    def __init__(
        self,
        first: Iterable[str],
        *,
        only: str | None,
        tell: Callable[[str], Document | None],
        mark: Callable[[], str],
        on_close: Callable[[Listener], None],
    ) -> None:
        self._first = dict.fromkeys(first)
        self._behind: dict[str, None] = {}
        self._only = only
        self._tell = tell
        self._mark = mark
        self._on_close = on_close
        self._reason = ""  # why no more is said
        self._is_told_so = False
        self._is_stopped = False
        self._news = asyncio.Event()

    def changed(self, task: str) -> None:
        """There is something to say of ``task``."""
        if self._reason or task in self._first or self._only not in (None, task):
            return
        self._behind[task] = None
        if len(self._behind) > MAX_BEHIND:
            self.end("you listen too slowly")
        self._news.set()

    def end(self, reason: str) -> None:
        """Say no more than this."""
        self._reason = self._reason or reason
        self._first.clear()
        self._behind.clear()
        self._news.set()

    def stop(self) -> None:
        """This table says no more; another one may."""
        self._is_stopped = True
        self._news.set()

    async def next(self) -> News | None:
        """The next word; None after the last. Raises ``ShuttingDown``."""
        while True:
            if self._is_stopped:
                raise ShuttingDown
            while queue := self._first or self._behind:
                task = next(iter(queue))
                del queue[task]
                document = self._tell(task)
                if document is not None:
                    mark = "" if self._first or self._behind else self._mark()
                    return News(mark, "task", document)
            if self._is_told_so:
                return None
            if self._reason:
                self._is_told_so = True
                return News("", "end", {"reason": self._reason})
            self._news.clear()
            await self._news.wait()

    def close(self) -> None:
        """Listen no more. Idempotent."""
        self._on_close(self)

    def __repr__(self) -> str:
        state = self._reason or f"{len(self._first) + len(self._behind)} tasks behind"
        return f"<Listener {state}>"


class Listeners:
    """All of them."""

    def __init__(self) -> None:
        self._all: set[Listener] = set()

    def __len__(self) -> int:
        return len(self._all)

    def add(
        self,
        first: Iterable[str],
        *,
        only: str | None,
        tell: Callable[[str], Document | None],
        mark: Callable[[], str],
    ) -> Listener:
        """A new one, to be told of ``first`` before anything else. Raises ``Overloaded``."""
        if len(self._all) >= MAX_LISTENERS:
            raise Overloaded(10.0, message=f"{MAX_LISTENERS} listen already")
        listener = Listener(first, only=only, tell=tell, mark=mark, on_close=self._all.discard)
        self._all.add(listener)
        return listener

    def changed(self, task: str) -> None:
        """There is something to say of ``task``."""
        for listener in self._all:
            listener.changed(task)

    def stop(self) -> None:
        """Let all of them go."""
        for listener in self._all:
            listener.stop()
