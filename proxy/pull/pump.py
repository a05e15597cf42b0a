"""Moving one turn's body to where it is taken, while the next bytes come in.

A body receives by itself, as far ahead as it has room for, so a plain loop does both at once: the
first bytes are taken at once, so the first reader waits for nothing; after that a piece is whatever
came in while the previous one was being written, so that a fast body costs few thread hops and a
slow one no delay. A body that outruns the disk has no room at some point: TCP stops the upstream.

Bytes are borrowed: they lie where the next ones may come once they have been taken. So ``take``
must be done with them when it returns, and however it ends, its thread must be too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from proxy.oci.digest import Chunk

Take = Callable[[list[Chunk]], Awaitable[None]]


class Lender(Protocol):
    """The body of one turn; ``b""`` is its end. What it lends is good until the next call."""

    async def borrow(self) -> Chunk: ...


async def pump(body: Lender, take: Take, is_cut: Callable[[], bool] = lambda: False) -> bool:
    """Until the body ends (true) or ``is_cut`` says so after a piece (false).

    Unless ``take`` fails or this is cancelled, what was borrowed has been taken when this returns
    or raises: the caller may go on at the byte after it. Raises what ``borrow`` and ``take`` raise.
    """
    while data := await body.borrow():
        await take([data])
        if is_cut():
            return False
    return True
