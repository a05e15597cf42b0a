"""Which hosts a rule means: the grammar of ``no_proxy`` and ``redirect_hosts``.

It is the one that Go programs, and with them container tools, read in NO_PROXY, so that a value
copied from there means the same here. An entry is one of

* ``*``: every host;
* ``example.com``: that host and every name below it;
* ``.example.com`` or ``*.example.com``: the names below it only;
* ``10.1.2.3``, ``10.0.0.0/8``, ``::1``, ``fd00::/8``: an address or a network;

and may end in a port (``example.com:8443``, ``[::1]:5000``), which then has to be the same.

Pure: text in, an answer out.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_FORM = "must be a host, .domain, address or network, with or without a port"
_NAME = re.compile(r"[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]*[a-z0-9_])?)*")
_PORT = re.compile(r"(?P<host>\[[^\]]*\]|[^:]*):(?P<port>[0-9]{1,5})")


@dataclass(frozen=True, slots=True)
class HostPattern:
    """One entry; ``domain`` is "" for every host and ``None`` where ``network`` says which."""

    domain: str | None
    below_only: bool = False
    network: Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, value: object) -> HostPattern:
        """Raises ``ValueError`` with the right form."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, str):
            raise ValueError(_FORM)
        text, port = value.strip().lower(), None
        if match := _PORT.fullmatch(text):
            text, port = match["host"], int(match["port"])
            if not 0 < port < 65536:
                raise ValueError("must end in a port between 1 and 65535")
        if text == "*":
            return cls("", port=port)
        network = _network(text)
        if network is not None:
            return cls(None, network=network, port=port)
        bare = text.removeprefix("*").removeprefix(".").removesuffix(".")
        if not _NAME.fullmatch(bare):
            raise ValueError(_FORM)
        return cls(bare, below_only=text[0] in "*.", port=port)

    def matches(self, host: str, port: int) -> bool:
        """Is this host (a name, or an address without brackets) with this port meant?"""
        if self.port is not None and self.port != port:
            return False
        if self.network is not None:
            address = address_of(host)
            return address is not None and address in self.network
        if not self.domain:
            return True
        name = host.lower().removesuffix(".")
        is_same = not self.below_only and name == self.domain
        return is_same or name.endswith(f".{self.domain}")

    def __str__(self) -> str:
        if self.network is not None:
            text = str(self.network)
            if self.network.num_addresses == 1:
                text = str(self.network.network_address)
            if self.port is not None and ":" in text:
                text = f"[{text}]"
        else:
            text = f".{self.domain}" if self.below_only else self.domain or "*"
        return text if self.port is None else f"{text}:{self.port}"


def any_matches(patterns: Iterable[HostPattern], host: str, port: int) -> bool:
    return any(pattern.matches(host, port) for pattern in patterns)


def address_of(host: str) -> Address | None:
    """The address that ``host`` is, or ``None`` for a name. IPv4 within IPv6 becomes IPv4."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return address.ipv4_mapped or address
    return address


def _network(text: str) -> Network | None:
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return ipaddress.ip_network(bare, strict=False)
    except ValueError:
        return None
