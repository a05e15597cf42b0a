"""Where sockets go to, and what is allowed there: the key and the settings of an origin."""

from __future__ import annotations

from dataclasses import dataclass, field

from yarl import URL

from proxy.upstream.certificates import Tls, TlsFiles
from proxy.upstream.egress import DIRECT, Egress
from proxy.upstream.stall import StallLimit


@dataclass(frozen=True, slots=True)
class OriginKey:
    """Where sockets go to: scheme, host, port."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: URL) -> OriginKey:
        """Raises ``ValueError`` for anything but http and https."""
        if url.scheme not in ("http", "https") or not url.host:
            raise ValueError(f"expected an http or https URL with a host, got {url.scheme!r}")
        return cls(url.scheme, url.host.lower(), url.port or 0)

    @property
    def label(self) -> str:
        """For metrics and logs; no two origins share one. The port of https is left out."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if (self.scheme, self.port) == ("https", 443) else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """How to reach an origin and how hard it may be used. Times in seconds."""

    max_connections: int = 16
    starts_low: bool = False  # the cap adapts from a low start (D6), else it is max_connections
    max_waiting: int = 10_000
    connect_timeout: float = 10.0
    read_timeout: float = 60.0
    stall: StallLimit = field(default_factory=StallLimit)
    tls: Tls = None
    proxy_tls: Tls = None  # for an egress proxy that speaks TLS
    egress: Egress = DIRECT
    fast_receive: bool = True  # large bodies past aiohttp

    @property
    def shows_certificate(self) -> bool:
        """Do its sockets tell the other side who we are?"""
        return isinstance(self.tls, TlsFiles) and self.tls.shows_certificate
