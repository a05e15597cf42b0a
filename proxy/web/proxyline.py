"""The PROXY protocol's header, versions 1 and 2, as HAProxy's specification has it.

A proxy that passes a connection on without reading it says in front of the first byte whom it is
from. Pure: bytes in, an address out.
"""

from __future__ import annotations

import ipaddress
import struct
from dataclasses import dataclass

from proxy.web.forwarded import parse_address

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
#: Bytes of a header of version 1, at most (§2.1).
MAX_LINE = 107
#: Bytes of a header of version 2 that are taken, with all that is appended to the addresses.
MAX_HEADER = 4096

_TCP4, _TCP6 = 0x11, 0x21


class NotProxied(ValueError):
    """The bytes do not begin with a header of the PROXY protocol."""


@dataclass(frozen=True, slots=True)
class Proxied:
    """A header: its length in bytes, and the client's address; None when it tells none."""

    length: int
    address: str | None


def parse_header(data: bytes) -> Proxied | None:
    """The header at the beginning; None when more bytes are needed. Raises ``NotProxied``."""
    if data.startswith(SIGNATURE):
        return _binary(data)
    if SIGNATURE.startswith(data):
        return None
    return _line(data)


def _line(data: bytes) -> Proxied | None:
    word = b"PROXY "
    if data[: len(word)] != word[: len(data)]:
        raise NotProxied("neither version of the PROXY protocol")
    line, end, _ = data[:MAX_LINE].partition(b"\r\n")
    if not end:
        if len(data) >= MAX_LINE:
            raise NotProxied("a line of the PROXY protocol that does not end")
        return None
    length = len(line) + 2
    words = line.decode("latin-1").split(" ")
    if words[1] == "UNKNOWN":
        return Proxied(length, None)
    versions = {"TCP4": 4, "TCP6": 6}
    if len(words) != 6 or words[1] not in versions:
        raise NotProxied("a malformed line of the PROXY protocol")
    try:
        address = ipaddress.ip_address(words[2])
    except ValueError:
        raise NotProxied("a line of the PROXY protocol without an address") from None
    if address.version != versions[words[1]] or "%" in words[2]:
        raise NotProxied("a line of the PROXY protocol with an address of another kind")
    return Proxied(length, str(parse_address(words[2])))


def _binary(data: bytes) -> Proxied | None:
    start = len(SIGNATURE) + 4
    if len(data) < start:
        return None
    version, family, size = struct.unpack_from("!BBH", data, len(SIGNATURE))
    if version not in (0x20, 0x21):  # version 2; LOCAL or PROXY
        raise NotProxied("another version of the PROXY protocol")
    length = start + size
    if length > MAX_HEADER:
        raise NotProxied("a header of the PROXY protocol that is too long")
    if len(data) < length:
        return None
    if version == 0x20 or family not in (_TCP4, _TCP6):
        return Proxied(length, None)
    width, needed = (4, 12) if family == _TCP4 else (16, 36)
    if size < needed:
        raise NotProxied("a header of the PROXY protocol without its addresses")
    address = ipaddress.ip_address(data[start : start + width])
    return Proxied(length, str(parse_address(str(address))))
