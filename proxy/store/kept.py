"""Files of stored blobs that stay open for a while after somebody has read them.

To open a file may wait for a disk, so a thread does it; the way there and back is a third of what a
short answer costs a loaded process. What is read once is often read again at once: the nodes of a
cluster pull the same layers. So the files that were read last stay open, and the next reader gets
one without a thread.

A kept file is no lease. It holds no pin and stands in nobody's way: who gives a blob up says so in
the same step (``drop``), and its file is closed before anybody removes the name. It goes as well
when ``most`` others were read since, when nobody has read it for ``seconds`` to twice as long, and
when descriptors run out.

Each reader gets the file opened anew, by the kernel's name for what is open (proc(5)), which asks
no disk. A descriptor of its own, since a sendfile that was interrupted may still hold the number of
one that is closed (``web/sending.py``); and no duplicate, for duplicates share what the kernel has
learned of how the file is read, and readers at different places would keep it from reading ahead.
Where there is no /proc, a thread opens the file each time, as it would without this.

What has happened to the file itself is seen each time, as by a thread that opens it: one that was
removed, or replaced by another, has no name left; one that was cut has another size.
"""

from __future__ import annotations

import asyncio
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import BinaryIO

from proxy.oci.digest import Digest

#: Files that are kept, at most: far fewer than the descriptors that clients leave to files.
MOST = 32
#: Seconds until one is closed that nobody has asked for.
SECONDS = 10.0


class KeptFiles:
    """Open files by digest. Belongs to the event loop that it is made in."""

    def __init__(self, *, most: int = MOST, seconds: float = SECONDS) -> None:
        self._most = most
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._files: OrderedDict[Digest, int] = OrderedDict()  # descriptors, read last at the end
        self._read: set[Digest] = set()  # since the last sweep
        self._sweeping: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __repr__(self) -> str:
        return f"<KeptFiles {len(self._files)}/{self._most}>"

    def lend(self, digest: Digest, size: int) -> BinaryIO | None:
        """A kept file of ``size`` bytes, opened anew; None: somebody has to open it by name."""
        kept = self._files.get(digest)
        if kept is None:
            return None
        try:
            found = os.fstat(kept)
            if not found.st_nlink or found.st_size != size:
                self.drop([digest])
                return None
            file = open(f"/proc/self/fd/{kept}", "rb", buffering=0)  # noqa: SIM115 -- leased out
        except OSError:  # no descriptor is left, say: these are the first that can be spared
            self.close()
            return None
        self._files.move_to_end(digest)
        self._read.add(digest)
        return file

    def keep(self, digest: Digest, file: BinaryIO) -> None:
        """Keep a file that was opened for a reader, who goes on with it."""
        self.drop([digest])
        try:
            self._files[digest] = os.dup(file.fileno())
        except OSError:
            self.close()
            return
        self._read.add(digest)
        if len(self._files) > self._most:
            self.drop([next(iter(self._files))])
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(self._seconds, self.sweep)

    def drop(self, digests: Iterable[Digest]) -> None:
        """Close these, as far as they are kept."""
        for digest in digests:
            kept = self._files.pop(digest, None)
            if kept is not None:
                self._read.discard(digest)
                os.close(kept)

    def sweep(self) -> None:
        """Close what nobody has read since the last time."""
        self.drop([digest for digest in self._files if digest not in self._read])
        self._read.clear()
        again = self._loop.call_later(self._seconds, self.sweep) if self._files else None
        self._sweeping = again

    def close(self) -> None:
        """Keep none any more, until the next one comes."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        self.drop(list(self._files))
