"""Counts the sockets that are open towards an address, as the kernel sees them.

A registry's own limit counts requests in progress; the promise under test is about sockets, idle
ones included, so it is asked of the kernel: /proc/net/tcp, many times a second.
"""

import threading
from pathlib import Path
from types import TracebackType
from typing import Self

# include/net/tcp_states.h. A socket counts until our side has closed it: being opened, open, and
# closed by the other side only.
_OPEN = {"01": "ESTABLISHED", "02": "SYN_SENT", "08": "CLOSE_WAIT"}

_EVERY = 0.002


def open_towards(port: int) -> set[str]:
    """The sockets of this machine that are open towards that port of 127.0.0.1, by inode.

    The table is read in pieces: one socket that closes and another that is opened meanwhile may
    both be in it although they never were at the same time.
    """
    remote = f"0100007F:{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    rows = (line.split() for line in lines)
    return {row[9] for row in rows if row[2] == remote and row[3] in _OPEN}


class Sampler:
    """Samples `open_towards` while it is entered; `peak` is the most that were open at a time:
    those that two readings in a row show were all there between the two."""

    def __init__(self, port: int) -> None:
        self.peak = 0
        self.samples = 0
        self._port = port
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._sample, name=f"sockets towards {port}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._enough.set()
        self._thread.join()

    def _sample(self) -> None:
        before: set[str] = set()
        while not self._enough.wait(_EVERY):
            now = open_towards(self._port)
            self.peak = max(self.peak, len(before & now))
            before = now
            self.samples += 1
