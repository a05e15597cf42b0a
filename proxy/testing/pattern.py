"""Blobs that are made as they are sent: as large as a test likes, and no memory for them.

A pattern repeats one block of noise, whose length is odd, so that no two places a turn, a stripe or
a page apart look alike; its last bytes are a number, so that there are as many different ones of a
size as somebody wants. Those share all of the work of their digests but the end.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from typing import overload

from proxy.oci.digest import Digest

_BLOCK = random.Random(1).randbytes((1 << 20) + 7)
_TAIL = 8
_STEP = 1 << 20


class Pattern:
    """Bytes ``start`` … ``stop`` of blob ``number`` of ``size`` bytes; a slice is one as well."""

    __slots__ = ("number", "size", "start", "stop")

    def __init__(self, size: int, number: int = 0, *, start: int = 0, stop: int | None = None):
        if size < _TAIL:
            raise ValueError(f"a pattern has at least {_TAIL} bytes, not {size}")
        self.size = size
        self.number = number
        self.start = start
        self.stop = size if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.start

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> Pattern: ...
    def __getitem__(self, at: int | slice) -> int | Pattern:
        if isinstance(at, int):
            return bytes(self[range(len(self))[at] :][:1])[0]
        start, stop, step = at.indices(len(self))
        if step != 1:
            raise ValueError("a pattern is cut into spans only")
        begin = self.start + start
        return Pattern(self.size, self.number, start=begin, stop=max(begin, self.start + stop))

    def __bytes__(self) -> bytes:
        noise_end = self.size - _TAIL
        parts, at = [], self.start
        while at < min(self.stop, noise_end):
            offset = at % len(_BLOCK)
            part = _BLOCK[offset : offset + min(self.stop, noise_end) - at]
            parts.append(part)
            at += len(part)
        if at < self.stop:
            tail = self.number.to_bytes(_TAIL, "big")
            parts.append(tail[at - noise_end : self.stop - noise_end])
        return b"".join(parts)

    def pieces(self) -> Iterator[bytes]:
        """All of it, a megabyte at a time."""
        for start in range(0, len(self), _STEP):
            yield bytes(self[start : start + _STEP])

    def __repr__(self) -> str:
        return f"<Pattern {self.number} of {self.size} bytes, {self.start}-{self.stop}>"


def digests(size: int, count: int) -> list[Digest]:
    """The SHA-256 digests of patterns 0 … ``count - 1`` of this size."""
    common = hashlib.sha256()
    for piece in Pattern(size)[: size - _TAIL].pieces():
        common.update(piece)
    found = []
    for number in range(count):
        whole = common.copy()
        whole.update(number.to_bytes(_TAIL, "big"))
        found.append(Digest.parse(f"sha256:{whole.hexdigest()}"))
    return found
