"""The event loop: uvloop, with aiofastnet's transports on top unless they are switched off (D17).

aiofastnet 1.2 loses the end of a body over TLS when reading is paused at the wrong moment. It takes
ciphertext into a buffer and decrypts at most 256 KiB of it for the protocol; if the protocol pauses
reading there, the rest stays in the buffer. After ``resume_reading`` it looks at the socket first:
nothing has come since, so it waits for more, and what it holds is never handed over. With its own
buffer of 257 KiB sixteen full records and the few hundred bytes of an answer's head before them are
enough: a pull stood still at the last bytes of a turn until the read time-out.

The mend is a buffer whose content, with what is left of a record from before, is always less than
one delivery: then nothing can stay behind. ``tests/unit/test_loop.py`` shows both.

And it tells the loop's exception handler of each client that leaves in the middle of its handshake:
what it means to be a ConnectionResetError is the class of one, which nobody takes for an error of
the network. To asyncio and uvloop that is nothing to report, so neither is it here.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiofastnet
import uvloop

from proxy.ready import Writers

T = TypeVar("T")

#: Bytes of a TLS record with its overhead, at most (RFC 8446 §5.2: 2^14 + 256, and the header).
_RECORD = (16 << 10) + 256 + 5
#: Bytes that aiofastnet hands to a protocol at once, at most.
_DELIVERY = 256 << 10
#: Bytes of ciphertext taken from a socket at once: with a record begun before, less than that.
INCOMING_BUFFER = _DELIVERY - 2 * _RECORD
#: The same for clients, who send little, and the bytes of ciphertext that wait for one of them: by
#: default 257 KiB, which a crowd of slow clients holds all the time.
CLIENT_BUFFER = 4 * _RECORD


def loop_factory(*, fast_transport: bool) -> Callable[[], asyncio.AbstractEventLoop]:
    """How to make the loop that serves."""
    return _fast_loop if fast_transport else uvloop.new_event_loop


def _fast_loop() -> asyncio.AbstractEventLoop:
    loop = aiofastnet.loop_factory(uvloop.new_event_loop)()
    # Not among the methods that aiofastnet replaces; the listener accepts by itself.
    accepted = functools.partial(aiofastnet.connect_accepted_socket, loop)
    loop.connect_accepted_socket = accepted  # type: ignore[method-assign]
    both = {"ssl_incoming_bio_size": CLIENT_BUFFER, "ssl_outgoing_bio_size": CLIENT_BUFFER}
    incoming = {"ssl_incoming_bio_size": INCOMING_BUFFER}
    for name, sizes in (
        ("create_connection", incoming),
        ("create_server", incoming),
        ("connect_accepted_socket", both),
    ):
        setattr(loop, name, _with_buffers(getattr(loop, name), sizes))
    writers, close = Writers(loop), loop.close
    loop.add_writer = writers.add_writer  # type: ignore[assignment,method-assign]
    loop.remove_writer = writers.remove_writer  # type: ignore[assignment,method-assign]

    def close_all() -> None:
        writers.close()
        close()

    loop.close = close_all  # type: ignore[method-assign]
    report = functools.partial(_report, loop.call_exception_handler)
    loop.call_exception_handler = report  # type: ignore[method-assign]
    return loop


def _report(tell: Callable[[dict[str, Any]], None], context: dict[str, Any]) -> None:
    """Tell the loop's exception handler, unless a client just left in its handshake."""
    if context.get("exception") is not ConnectionResetError:
        tell(context)


def _with_buffers(
    open_: Callable[..., Awaitable[T]], sizes: Mapping[str, int]
) -> Callable[..., Awaitable[T]]:
    """``open_``, with buffers of these sizes for TLS unless it is told others."""

    @functools.wraps(open_)
    def opened(*args: Any, ssl: Any = None, **kwargs: Any) -> Awaitable[T]:
        return open_(*args, ssl=ssl, **({**sizes, **kwargs} if ssl else kwargs))

    return opened
