"""What belongs to the process and not to a proxy: its signals, and the garbage collector."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator


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
async def signals() -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def asked() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
