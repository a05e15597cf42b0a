"""Byte ranges: what a client asks for, and what a body holds (RFC 9110 §14).

Two states, two types. A `ByteRange` is a wish that may not fit; a `Span` is a piece of content
that exists. Several ranges in one request are answered with the whole body, which §14.2 allows and
every client of registries takes (podman asks for several with zstd:chunked).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from proxy.oci.errors import RangeNotSatisfiable

# §14.1.1: range-unit "=" range-set, units are case-insensitive. Digits are bounded because Python
# refuses to convert very long ones; 32 digits hold every number that clients send for "the end".
_UNIT = re.compile(r"[ \t]*bytes[ \t]*=", re.IGNORECASE)
_SPEC = re.compile(r"([0-9]{0,32})-([0-9]{0,32})")
_CONTENT_RANGE = re.compile(
    r"[ \t]*bytes[ \t]+([0-9]{1,32})-([0-9]{1,32})/([0-9]{1,32}|\*)[ \t]*", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes from `start` up to, not including, `stop`, of content with `size` bytes.

    `size` None: unknown. Raises ValueError for bounds that cannot be.
    """

    start: int
    stop: int
    size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop or (self.size is not None and self.stop > self.size):
            raise ValueError(f"no such span: {self.start} to {self.stop} of {self.size}")

    @property
    def length(self) -> int:
        """How many bytes."""
        return self.stop - self.start

    @property
    def content_range(self) -> str:
        """The Content-Range of a 206. Raises ValueError for an empty span: it has no such form."""
        if self.start == self.stop:
            raise ValueError("an empty span has no Content-Range")
        size = "*" if self.size is None else self.size
        return f"bytes {self.start}-{self.stop - 1}/{size}"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """One asked range: `first` to `last` inclusive, or `first` to the end.

    `first` None means a suffix of `last` bytes. Raises ValueError when the two make no range.
    """

    first: int | None
    last: int | None

    def __post_init__(self) -> None:
        first, last = self.first, self.last
        if first is None and last is None:
            raise ValueError("a range needs a first or a last position")
        if min(first or 0, last or 0) < 0:
            raise ValueError("positions are not negative")
        if first is not None and last is not None and last < first:
            raise ValueError(f"the range ends at {last} before it starts at {first}")

    @classmethod
    def parse(cls, header: str | None) -> Self | None:
        """Read a Range header. None: absent, malformed, another unit or several ranges.

        None means "send the whole body": §14.2 lets a server ignore the header, and asks that
        of it for units and forms it does not know.
        """
        unit = _UNIT.match(header or "")
        if header is None or unit is None:
            return None
        # §5.6.1.2: empty elements of a list are ignored.
        specs = [item for part in header[unit.end() :].split(",") if (item := part.strip(" \t"))]
        spec = _SPEC.fullmatch(specs[0]) if len(specs) == 1 else None
        if spec is None:
            return None
        first, last = (int(digits) if digits else None for digits in spec.groups())
        try:
            return cls(first, last)
        except ValueError:
            return None

    def resolve(self, size: int) -> Span:
        """The bytes this range selects from content of `size` bytes. Raises RangeNotSatisfiable."""
        start, stop = self._bounds(size)
        if start >= stop:  # nothing selected: a start beyond the end, a suffix of 0, no content
            raise RangeNotSatisfiable(size)
        return Span(start, stop, size)

    def _bounds(self, size: int) -> tuple[int, int]:
        if self.first is None:
            return max(0, size - (self.last or 0)), size
        return self.first, size if self.last is None else min(self.last + 1, size)

    def __str__(self) -> str:
        first = "" if self.first is None else self.first
        last = "" if self.last is None else self.last
        return f"bytes={first}-{last}"


def parse_content_range(header: str | None) -> Span | None:
    """Read the Content-Range of a 206. None: absent, malformed, or the `*/size` of a 416."""
    found = _CONTENT_RANGE.fullmatch(header or "")
    if found is None:
        return None
    first, last, size = found.groups()
    if int(last) < int(first):
        return None
    try:
        return Span(int(first), int(last) + 1, None if size == "*" else int(size))
    except ValueError:
        return None
