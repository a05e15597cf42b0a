"""Whose request it is when it comes through proxies: the address that can be believed.

Every proxy on the way appends to X-Forwarded-For the address it was called from. So the rightmost
entry was written by our peer, the one before it by the peer's peer, and whatever stands further
left than the first address that is not a trusted proxy was written by a stranger. The header is
read from the right for as long as those who wrote it are trusted, and not at all when the peer
is not.

Pure: addresses in, an address out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: Proxies in a row that are believed, at most: more is a loop, or somebody who plays.
MAX_HOPS = 32

# RFC 7239 §6: an IPv6 address may stand in brackets, and then with a port; IPv4 with a port too.
_BRACKETED = re.compile(r"\[(?P<host>[0-9A-Fa-f:.]+)\](?::[0-9]{1,5})?")
_WITH_PORT = re.compile(r"(?P<host>[0-9.]+):[0-9]{1,5}")


def client_address(peer: str, forwarded: Sequence[str], trusted: Sequence[Network]) -> str:
    """The rightmost address of ``forwarded`` that is not itself trusted, when ``peer`` is trusted.

    ``forwarded`` holds the values of all X-Forwarded-For headers in their order. What is malformed
    is not believed, nor anything to the left of it: nobody vouches for that. When every entry is
    trusted, the leftmost is the client.
    """
    if not is_trusted(parse_address(peer), trusted):
        return peer
    believed = peer
    for hop, entry in enumerate(_from_the_right(forwarded)):
        address = parse_address(entry)
        if address is None or hop == MAX_HOPS:
            break
        believed = str(address)
        if not is_trusted(address, trusted):
            break
    return believed


def parse_address(text: str) -> Address | None:
    """An address with or without a port; None when it is none. IPv4 within IPv6 becomes IPv4."""
    text = text.strip()
    match = _BRACKETED.fullmatch(text) or _WITH_PORT.fullmatch(text)
    if "%" in text:  # a zone means something on one machine only, and may be any text
        return None
    try:
        address = ipaddress.ip_address(match["host"] if match else text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def is_trusted(address: Address | None, trusted: Iterable[Network]) -> bool:
    """Whether one of the networks holds this address."""
    return address is not None and any(address in network for network in trusted)


def _from_the_right(forwarded: Sequence[str]) -> Iterator[str]:
    """The entries, the last first; a long header is not taken apart further than it is read."""
    for line in reversed(forwarded):
        rest, comma = line, ","
        while comma:
            rest, comma, entry = rest.rpartition(",")
            yield entry
