"""What belongs to the process and not to a proxy: what ends it, the errors that nobody hears, and
the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

from proxy.observe.logs import Logger


def hold_collecting() -> None:
    """No garbage collection until ``begin_collecting``: what a start makes (the code, an object for
    each blob that is held) stays, and every round would look at all of it and find nothing."""
    gc.disable()


def begin_collecting() -> None:
    """Collect garbage from now on, and never look at what is there already: with many blobs a full
    round over them would hold the loop up."""
    gc.freeze()
    gc.enable()


@contextlib.asynccontextmanager
async def ending(lifeline: int | None = None) -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once.

    The end of the pipe ``lifeline``, whose other end the supervisor holds, sets it too. A worker
    gets many a signal twice, by a terminal or systemd, which tell all processes of a group, and by
    the supervisor: to it a second one says nothing, and the supervisor kills it if asked to.
    """
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set() and lifeline is None:
            os._exit(1)
        stop.set()

    def orphaned() -> None:
        if lifeline is not None:
            loop.remove_reader(lifeline)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    if lifeline is not None:
        loop.add_reader(lifeline, orphaned)
    try:
        yield stop
    finally:
        if lifeline is not None:
            loop.remove_reader(lifeline)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def unheard(log: Logger) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the loop would print about errors that nobody waits for goes to the log."""

    def handler(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error(
            "unheard_error", message=context.get("message"), exc_info=context.get("exception")
        )

    return handler
