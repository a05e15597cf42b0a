"""Who asks: the name a client is known by, for fairness and for the log."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from proxy.web.forwarded import Network, client_address
from proxy.web.tls import certificate_name


@dataclass(frozen=True, slots=True)
class Clients:
    """Tells clients apart. ``trusted_proxies`` are believed when they say whom they speak for."""

    trusted_proxies: tuple[Network, ...] = ()

    def address(self, request: web.BaseRequest) -> str:
        """The client's address: the peer's, or what a trusted proxy says."""
        peer = request.remote or "unknown"
        # What could not be parsed comes with a plain dict for its headers, which is empty.
        if not self.trusted_proxies or not request.headers:
            return peer
        forwarded = request.headers.getall("X-Forwarded-For", ())
        return client_address(peer, forwarded, self.trusted_proxies)


def certified(request: web.BaseRequest) -> str | None:
    """The name in the certificate that the client has shown, if it has."""
    transport = request.transport
    if transport is None:
        return None
    return certificate_name(transport.get_extra_info("peercert"))
