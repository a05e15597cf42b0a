"""How messages lie in the stream between leader and follower; pure.

A frame is a fixed head (lengths, the number of the call, the number of descriptors that come with
it), a JSON object, and bytes. Descriptors travel beside the stream and arrive in order, at the
latest with the first byte of their frame; whoever receives pairs them by these numbers.

Nothing is longer than its bound, which is looked at before anything is kept, so a peer that says
nonsense costs 17 bytes and is disconnected.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

#: Said in the first frame of each side; peers of another version do not understand one another.
VERSION = 2
#: Bytes of a frame's JSON and of its data, at most: a manifest has 4 MiB, a listing 8 MiB.
MAX_FIELDS = 256 << 10
MAX_DATA = 16 << 20
#: Digests in one frame, at most.
MAX_DIGESTS = 1000
#: Images in one frame, at most: a repository's name has 255 characters, an upstream's as many.
MAX_IMAGES = 250
#: Descriptors of a frame, at most.
MAX_FDS = 1

_HEAD = struct.Struct("!IIQB")


class BadFrame(Exception):
    """The peer says what no peer of this version would."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message: its ``kind``, and to which ``call`` it belongs (0: to none)."""

    kind: str
    call: int = 0
    fields: Mapping[str, Any] = field(default_factory=dict)
    data: bytes = b""
    fds: int = 0

    def encode(self) -> bytes:
        """The frame's bytes. Raises ``ValueError`` for what is beyond the bounds."""
        head = json.dumps({**self.fields, "kind": self.kind}, separators=(",", ":")).encode()
        if len(head) > MAX_FIELDS or len(self.data) > MAX_DATA or self.fds > MAX_FDS:
            raise ValueError(f"a frame of {len(head)} + {len(self.data)} bytes is too long")
        return _HEAD.pack(len(head), len(self.data), self.call, self.fds) + head + self.data


class Frames:
    """Cuts a stream, which arrives in pieces of any length, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are complete with ``data``. Raises ``BadFrame``; then it is over."""
        self._buffer += data
        start = 0
        try:
            while (found := self._at(start)) is not None:
                frame, start = found
                yield frame
        finally:
            del self._buffer[:start]

    def _at(self, start: int) -> tuple[Frame, int] | None:
        """The frame that begins at ``start``, and where it ends."""
        buffer = self._buffer
        if len(buffer) - start < _HEAD.size:
            return None
        fields, data, call, fds = _HEAD.unpack_from(buffer, start)
        if fields > MAX_FIELDS or data > MAX_DATA or fds > MAX_FDS:
            raise BadFrame(f"a frame of {fields} + {data} bytes with {fds} descriptors")
        middle = start + _HEAD.size + fields
        stop = middle + data
        if len(buffer) < stop:
            return None
        document = _parse(bytes(buffer[start + _HEAD.size : middle]))
        kind = document.pop("kind", None)
        if not isinstance(kind, str):
            raise BadFrame("a frame without a kind")
        return Frame(kind, call, document, bytes(buffer[middle:stop]), fds), stop

    def __len__(self) -> int:
        """Bytes of a frame that is not complete yet."""
        return len(self._buffer)


def _parse(text: bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadFrame(f"a frame's fields are no JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadFrame("a frame's fields are no object")
    return document
