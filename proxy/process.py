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

#: What asks the process to end.
ENDING = (signal.SIGTERM, signal.SIGINT)
#: Seconds between two looks whether all garbage is to be collected.
SWEEP_INTERVAL = 1.0
#: Rounds over the young ones before a full round: Python's own number, and more for each client.
FEW_ROUNDS, ROUNDS_EACH = 10, 0.03
#: How much of a crowd that has left counts a look later.
MEMORY = 0.95
_NEVER = 1 << 30


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
async def collecting(clients: Callable[[], int]) -> AsyncIterator[None]:
    """``begin_collecting``, and full rounds when it is time for one and not while a crowd
    comes or goes, as long as the block lasts. ``clients``: the connections that are open now.

    A full round looks at all that is alive: with 5,000 clients that follow a fill, 0.1 to 0.3 s in
    which nobody is served. Python begins one whenever a quarter more has come, so several of them
    while a crowd comes. But what a crowd brings goes with it, without a round; what only a full
    round finds is what flights leave, objects that refer to one another.
    """
    young, middle, old = gc.get_threshold()
    begin_collecting()
    gc.set_threshold(young, middle, _NEVER)
    sweeping = asyncio.create_task(_sweep(clients), name="collect garbage")
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)
        sweeping.cancel()
        await asyncio.wait([sweeping])


async def _sweep(clients: Callable[[], int]) -> None:
    most = 0.0  # clients of late: nor while a crowd goes
    while True:
        await asyncio.sleep(SWEEP_INTERVAL)
        most = max(clients(), most * MEMORY)
        if is_full_round_due(gc.get_count()[2], most):
            gc.collect()


def is_full_round_due(rounds: int, clients: float) -> bool:
    """After so many rounds over what is young, each of which stands for 7,000 objects that have
    come and not gone at once? As ever without clients; else not before as much has come as they
    all have themselves, and half of that again."""
    return rounds >= FEW_ROUNDS + clients * ROUNDS_EACH


@contextlib.asynccontextmanager
async def ending(lifeline: int | None = None) -> AsyncIterator[asyncio.Event]:
    """An event that SIGTERM or SIGINT sets; a second one ends the process at once.

    The end of the pipe ``lifeline``, whose other end the supervisor holds, sets it too. A worker
    gets many a signal twice, by a terminal or systemd, which tell all processes of a group, and by
    the supervisor: to it a second one says nothing, and the supervisor kills it if asked to; nor
    does one after the block, when it has drained. Until the block both may be blocked; what came
    meanwhile is heard at its beginning.
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

    for number in ENDING:
        loop.add_signal_handler(number, asked)
    if lifeline is not None:
        loop.add_reader(lifeline, orphaned)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield stop
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if lifeline is not None:
            loop.remove_reader(lifeline)
        for number in ENDING:
            loop.remove_signal_handler(number)
            if lifeline is not None:  # else SIGINT would make a defect of what has ended well
                signal.signal(number, signal.SIG_IGN)


def unheard(log: Logger) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """What the loop would print about errors that nobody waits for goes to the log."""

    def handler(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        log.error(
            "unheard_error", message=context.get("message"), exc_info=context.get("exception")
        )

    return handler
