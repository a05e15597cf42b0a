"""Which digests no repository is known to have, from memory.

A cold blob that no manifest has named yet is looked for among the links, to find nothing: a way to
the index's thread and back before the upstream is asked, for which its client waits. So there is a
bit for each of many values of a digest. One that is not set says that the index has no link of such
a digest; one that is set says nothing, for others share it, and it stays when links go.

Before all links of the index have been read (``learn``) it says nothing at all. Links that are
noted meanwhile are set by whoever notes them, in the same step, so the order of the two does not
matter.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from functools import partial

from proxy.oci.digest import Digest
from proxy.store.index import Index, IndexFailed

LinkKey = tuple[str, str, str]  # upstream, repository, digest

#: 256 KiB; with 100,000 links 5 of 100 digests without one look as if they had one.
BITS = 1 << 21
#: Links that are read at once: others want the index, too.
LOT = 4096


class LinkHints:
    """Of the links of one index."""

    def __init__(self, bits: int = BITS) -> None:
        self._is_complete = False  # all links that were there before are set
        self._bits = bytearray(bits // 8)
        self._mask = bits - 1

    def add(self, encoded: str) -> None:
        """There is, or will be, a link to the digest of this hex."""
        place = hash(encoded) & self._mask
        self._bits[place >> 3] |= 1 << (place & 7)

    def exclude(self, digest: Digest) -> bool:
        """Is it certain that there is no link to it?"""
        place = hash(digest.hex) & self._mask
        return self._is_complete and not self._bits[place >> 3] & 1 << (place & 7)

    async def learn(self, index: Index, ends: Callable[[], bool], *, lot: int = LOT) -> None:
        """Read all links; ``ends`` says that nobody needs it any more. An index that fails is asked
        as ever."""
        rows: Sequence[LinkKey] = [("", "", "")]
        try:
            while rows and not ends():
                rows = await index.run(partial(_links_after, rows[-1], lot))
                for _, _, digest in rows:
                    self.add(digest.partition(":")[2])
        except IndexFailed:
            return
        self._is_complete = not rows

    def __repr__(self) -> str:
        return f"<LinkHints {'complete' if self._is_complete else 'to be learned'}>"


def _links_after(last: LinkKey, most: int, connection: sqlite3.Connection) -> Sequence[LinkKey]:
    """The next links, in the order of their key."""
    return connection.execute(
        "SELECT upstream, repository, digest FROM link "
        "WHERE (upstream, repository, digest) > (?, ?, ?) "
        "ORDER BY upstream, repository, digest LIMIT ?",
        (*last, most),
    ).fetchall()
