"""How far a redirect or a token service may lead, by the address that is really dialled.

Whoever answers for an upstream chooses where its redirects and its token realm lead. Without a rule
it could have us ask the cloud's metadata service, our own loopback or the neighbours in our network
(SSRF), and no look at names would help: a name may resolve to anything, and to something else the
next time. So the rule is about addresses and is applied where a socket is made, and again where one
that is open already is used.

The rule: addresses have a *scope*, from everybody's to this machine's own, and an answer may lead
as near as the place it came from, never nearer. A registry on the internet leads to the internet; a
Harbor in a private network leads to the MinIO beside it; one on loopback to loopback. Link-local,
multicast, unspecified and reserved addresses are nobody's to lead to. In a chain the farthest
answer counts. Hosts and networks that the operator listed are exempt.

Behind an egress proxy the names are resolved out of our sight: then only what the URL itself says
can be judged.

Pure: addresses in, an answer out.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

from proxy.oci.errors import RedirectRefused
from proxy.upstream.hosts import Address, HostPattern, any_matches

_SHARED = ipaddress.ip_network("100.64.0.0/10")  # RFC 6598: carriers' and clouds' own
_SITE_LOCAL = ipaddress.ip_network("fec0::/10")  # RFC 3879: deprecated, still routed inside
_THIS_NETWORK = ipaddress.ip_network("0.0.0.0/8")
# Addresses of IPv6 that carry one of IPv4, and how far that is from the right: IPv4-compatible
# (RFC 4291), NAT64 (RFC 6052, RFC 8215), 6to4 (RFC 3056).
_EMBEDDED = (
    (ipaddress.ip_network("::/96"), 0),
    (ipaddress.ip_network("64:ff9b::/96"), 0),
    (ipaddress.ip_network("64:ff9b:1::/48"), 0),
    (ipaddress.ip_network("2002::/16"), 80),
)


class Scope(IntEnum):
    """Whose an address is; a larger one is nearer to us."""

    PUBLIC = 0
    PRIVATE = 1
    LOOPBACK = 2
    LINK_LOCAL = 3
    NOWHERE = 4  # unspecified, multicast, reserved

    @property
    def word(self) -> str:
        return "reserved" if self is Scope.NOWHERE else self.name.lower().replace("_", "-")


@dataclass(frozen=True, slots=True)
class Reach:
    """How near a request may be led; ``exempt`` are the hosts and networks it may reach anyway."""

    limit: Scope = Scope.NOWHERE
    exempt: tuple[HostPattern, ...] = ()

    def after(self, place: str) -> Reach:
        """What is left of it when the answer came from ``place`` (an address, or a name)."""
        scope = scope_of(place)
        # Nobody leads to where only the operator may point us.
        return replace(self, limit=min(self.limit, scope, Scope.LOOPBACK))

    def allows(self, place: str, port: int) -> bool:
        """May a socket go to ``place`` (an address, or a name)?"""
        return scope_of(place) <= self.limit or any_matches(self.exempt, place, port)

    def expect(self, place: str, port: int, name: str) -> None:
        """Raise ``RedirectRefused`` if ``name``, which is at ``place``, is too near."""
        if self.allows(place, port) or any_matches(self.exempt, name, port):
            return
        where = name if name == place else f"{name} at {place}"
        raise RedirectRefused(
            f"an answer leads to {where}, a {scope_of(place).word} address, which redirect_hosts "
            "does not list"
        )


#: For requests that nobody but the operator led.
ANYWHERE = Reach()


def allowing(exempt: Sequence[HostPattern]) -> Reach:
    """Before anybody has answered."""
    return Reach(exempt=tuple(exempt))


def scope_of(place: str) -> Scope:
    """The scope of an address in any spelling; names are public, except those of this machine."""
    address = _address(place)
    if address is None:
        name = place.lower().removesuffix(".")
        is_here = name == "localhost" or name.endswith(".localhost")  # RFC 6761
        return Scope.LOOPBACK if is_here else Scope.PUBLIC
    return _scope(address)


def _address(place: str) -> Address | None:
    bare = place.strip("[]").partition("%")[0]  # a zone says on which interface, not what it is
    try:
        return ipaddress.ip_address(bare)
    except ValueError:
        pass
    try:
        # 127.1, 0x7f000001, 2130706433: what the C library takes for an address.
        return ipaddress.IPv4Address(socket.inet_aton(bare))
    except (OSError, UnicodeEncodeError, ValueError):
        return None


def _scope(address: Address) -> Scope:
    if isinstance(address, ipaddress.IPv6Address):
        return _scope_of_six(address)
    if address.is_loopback:
        return Scope.LOOPBACK
    if address.is_link_local:
        return Scope.LINK_LOCAL
    if address.is_multicast or address.is_reserved or address in _THIS_NETWORK:
        return Scope.NOWHERE
    return Scope.PRIVATE if address.is_private or address in _SHARED else Scope.PUBLIC


def _scope_of_six(address: ipaddress.IPv6Address) -> Scope:
    if address.is_loopback:
        return Scope.LOOPBACK
    if address.is_unspecified or address.is_multicast:
        return Scope.NOWHERE
    if address.ipv4_mapped is not None:
        return _scope(address.ipv4_mapped)
    for network, shift in _EMBEDDED:
        if address in network:
            return _scope(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    if address.is_link_local:
        return Scope.LINK_LOCAL
    if address.is_private or address in _SITE_LOCAL:
        return Scope.PRIVATE
    return Scope.NOWHERE if address.is_reserved else Scope.PUBLIC
